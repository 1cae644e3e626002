//! `strace` on a running server: what it asks of the kernel, and what becomes of it when the kernel does not play along.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

use super::machine::{has_tools, skip};

const PATIENCE: Duration = Duration::from_secs(20);

/// A tracer. Dropping it kills it, and lets the server go on.
pub struct Strace {
    child: Child,
}

impl Strace {
    /// Attaches to all threads of a process, those included that it will start; `None`, with a line that says so, where that cannot be done.
    pub async fn attach(what: &str, pid: u32, arguments: &[&str], log: &Path) -> Option<Self> {
        if !has_tools(what, &["strace"]) {
            return None;
        }
        let mut command = Command::new("strace");
        command.args(["-f", "-o"]).arg(log).args(arguments).args(["-p", &pid.to_string()]);
        let mut child = command.stdin(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true).spawn().expect("strace runs");
        let mut said = BufReader::new(child.stderr.take().expect("stderr is piped")).lines();
        let attached = async {
            let mut all = String::new();
            while let Ok(Some(line)) = said.next_line().await {
                if line.contains("attached") {
                    return Ok(());
                }
                all.push_str(&line);
            }
            Err(all)
        };
        match tokio::time::timeout(PATIENCE, attached).await.expect("strace says what it does") {
            Ok(()) => {
                // What it says of threads that come and go must not fill its pipe.
                tokio::spawn(async move { while let Ok(Some(_)) = said.next_line().await {} });
                Some(Self { child })
            }
            Err(refused) => {
                skip(what, &format!("strace may not: {refused}"));
                None
            }
        }
    }

    /// Lets the server go on by itself; the log is whole then.
    pub async fn detach(mut self) {
        if let Some(pid) = self.child.id().and_then(|pid| rustix::process::Pid::from_raw(pid as i32)) {
            rustix::process::kill_process(pid, rustix::process::Signal::TERM).ok();
        }
        tokio::time::timeout(PATIENCE, self.child.wait()).await.expect("strace ends").expect("waited for");
    }
}
