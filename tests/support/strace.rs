//! `strace` on a server: what it asks of the kernel, and what becomes of it when the kernel does not play along.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::NamedTempFile;
use tokio::io::{AsyncBufReadExt, BufReader};

use super::machine::{has_tools, skip};
use super::test_app::{ADMIN_KEY, TestApp};

/// Starts and kills under strace are slow.
const PATIENCE: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(10);
/// How long a tracer may take to let a server go; then the kernel does it.
const LETS_GO: Duration = Duration::from_secs(2);
/// Every call that puts bytes into a file.
const WRITES: &str = "write,pwrite64,writev,pwritev,pwritev2";

/// A tracer of a running server. Dropping it lets the server go on by itself; its log is whole then.
pub struct Strace {
    child: std::process::Child,
}

/// One that has been started, and what it has said.
struct Attaching {
    what: String,
    said: NamedTempFile,
    since: Instant,
    strace: Strace,
}

impl Strace {
    /// Attaches to all threads of a process, those included that it will start; `None`, with a line that says so, where that cannot be done.
    pub async fn attach(what: &str, pid: u32, arguments: &[&str], log: &Path) -> Option<Self> {
        let mut attaching = Attaching::start(what, pid, arguments, log)?;
        while !attaching.has_ended()? {
            tokio::time::sleep(LOOK).await;
        }
        Some(attaching.strace)
    }

    /// Has calls of the server fail or wait, as in `error=EIO:when=3` or `delay_enter=300000`: writes to one file, or calls by name.
    pub fn inject(app: &TestApp, calls: Option<&str>, fault: &str, file: Option<&Path>) -> Option<Self> {
        let files: Vec<&Path> = file.into_iter().collect();
        Self::inject_on(app, calls.unwrap_or(WRITES), fault, &files)
    }

    /// The same for calls on any of these files, however the calls name them.
    pub fn inject_on(app: &TestApp, calls: &str, fault: &str, files: &[&Path]) -> Option<Self> {
        let (trace, inject) = (format!("trace={calls}"), format!("inject={calls}:{fault}"));
        let mut arguments = vec!["-e", &trace, "-e", &inject];
        for file in files {
            arguments.extend(["-P", file.to_str().expect("a path of text")]);
        }
        let mut attaching = Attaching::start("calls to the kernel that fail or wait", app.pid(), &arguments, Path::new("/dev/null"))?;
        while !attaching.has_ended()? {
            std::thread::sleep(LOOK);
        }
        Some(attaching.strace)
    }
}

impl Attaching {
    fn start(what: &str, pid: u32, arguments: &[&str], log: &Path) -> Option<Self> {
        if !has_tools(what, &["strace"]) {
            return None;
        }
        // Into a file, and no pipe, which would want a reader for all it says of threads that come and go.
        let said = NamedTempFile::new().expect("a file");
        let mut command = std::process::Command::new("strace");
        command.args(["-f", "-o"]).arg(log).args(arguments).args(["-p", &pid.to_string()]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(said.reopen().expect("the file is there"));
        let strace = Strace { child: command.spawn().expect("strace runs") };
        Some(Self { what: what.to_owned(), said, since: Instant::now(), strace })
    }

    /// Whether it is attached by now; `None` when it may not.
    fn has_ended(&mut self) -> Option<bool> {
        let ended = self.strace.child.try_wait().expect("waited for").is_some();
        let said = std::fs::read_to_string(self.said.path()).expect("text");
        if said.contains(" attached") {
            return Some(true);
        }
        if ended {
            assert!(said.contains("not permitted"), "{said}");
            skip(&self.what, &format!("strace may not attach: {}", said.trim()));
            return None;
        }
        assert!(self.since.elapsed() < PATIENCE, "strace does not attach: {said}");
        Some(false)
    }
}

impl Drop for Strace {
    fn drop(&mut self) {
        let pid = Pid::from_raw(self.child.id() as i32).expect("it was started");
        // What it traced may have died, and it with that. One that is asked to let go of what just dies may wait for it for ever.
        kill_process(pid, Signal::INT).ok();
        let since = Instant::now();
        while self.child.try_wait().is_ok_and(|ended| ended.is_none()) && since.elapsed() < LETS_GO {
            std::thread::sleep(LOOK);
        }
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// Whether this machine lets a server be traced from its start; says so where it does not.
pub fn is_here() -> bool {
    const WHAT: &str = "killing the server at steps of its start and its end";
    if !has_tools(WHAT, &["strace"]) {
        return false;
    }
    let traced = std::process::Command::new("strace").args(["-f", "-o", "/dev/null", "true"]).stderr(Stdio::null()).status();
    let here = traced.is_ok_and(|status| status.success());
    if !here {
        skip(WHAT, "strace may not trace");
    }
    here
}

/// A server that is traced from its first call on.
pub struct Traced {
    child: tokio::process::Child,
    lines: tokio::io::Lines<BufReader<tokio::process::ChildStderr>>,
}

/// How a start under strace went.
#[derive(Debug, PartialEq, Eq)]
pub enum Start {
    Listening(String),
    Died,
}

impl Traced {
    /// A server in `dir` with these arguments of strace.
    pub fn start(dir: &Path, args: &[String]) -> Self {
        let env: BTreeMap<&str, &str> = BTreeMap::from([
            ("HOST", "127.0.0.1"),
            ("PORT", "0"),
            ("ADMIN_API_KEY", ADMIN_KEY),
            ("LIVE_MEETING__INGEST__AUTH", "open"),
            ("LIVE_MEETING__HTTP__WORKERS", "2"),
            ("RUST_LOG", "live_meeting=debug"),
        ]);
        let path = std::env::var("PATH").unwrap_or_default();
        let mut command = tokio::process::Command::new("strace");
        command.args(["-f", "-qq"]).args(args).args([env!("CARGO_BIN_EXE_live-meeting"), "serve"]);
        command.current_dir(dir).env_clear().envs(env).env("PATH", path).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.kill_on_drop(true).spawn().expect("strace starts");
        let lines = BufReader::new(child.stderr.take().expect("stderr is piped")).lines();
        Self { child, lines }
    }

    /// Waits until it listens or has died.
    pub async fn started(&mut self) -> Start {
        let started = async {
            while let Ok(Some(line)) = self.lines.next_line().await {
                if let Some((_, address)) = line.split_once("listening address=") {
                    return Start::Listening(address.trim().to_owned());
                }
            }
            Start::Died
        };
        tokio::time::timeout(PATIENCE, started).await.expect("it starts or dies")
    }

    /// Waits for its end, by itself or by `kill -9`. Strace ends with the server.
    pub async fn ended(mut self, kill: bool) {
        if kill {
            let pid = self.child.id().expect("strace runs");
            // The tracee is strace's only child.
            let server = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
            if let Some(server) = server.trim().parse().ok().and_then(Pid::from_raw) {
                kill_process(server, Signal::KILL).ok();
            }
        }
        let mut rest = async || while let Ok(Some(_)) = self.lines.next_line().await {};
        if kill && tokio::time::timeout(LETS_GO, rest()).await.is_err() {
            // It does not notice the death of a thread that it holds in a call. Without it the kernel lets that go.
            self.child.start_kill().ok();
        }
        tokio::time::timeout(PATIENCE, rest()).await.expect("it ends");
        tokio::time::timeout(PATIENCE, self.child.wait()).await.expect("strace ends").expect("waited for");
    }
}
