//! A server under `strace`, which kills it at a chosen call or writes down what it does.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::process::Stdio;
use std::sync::Once;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, ChildStderr, Command};

use crate::support::test_app::ADMIN_KEY;

/// Starts and kills under strace are slow.
const PATIENCE: Duration = Duration::from_secs(60);

/// Whether this machine lets a process be traced; says so where it does not.
pub fn is_here() -> bool {
    static SAID: Once = Once::new();
    let traced = std::process::Command::new("strace").args(["-f", "-o", "/dev/null", "true"]).stderr(Stdio::null()).status();
    let here = traced.is_ok_and(|status| status.success());
    if !here {
        SAID.call_once(|| writeln!(std::io::stderr(), "skipped: strace cannot be used here").expect("stderr"));
    }
    here
}

pub struct Traced {
    pub child: Child,
    lines: tokio::io::Lines<BufReader<ChildStderr>>,
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
        let mut command = Command::new("strace");
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
            if let Some(server) = server.trim().parse().ok().and_then(rustix::process::Pid::from_raw) {
                rustix::process::kill_process(server, rustix::process::Signal::KILL).ok();
            }
        }
        let rest = async { while let Ok(Some(_)) = self.lines.next_line().await {} };
        tokio::time::timeout(PATIENCE, rest).await.expect("it ends");
        tokio::time::timeout(PATIENCE, self.child.wait()).await.expect("strace ends").expect("waited for");
    }
}
