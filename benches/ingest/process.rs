//! A sink in a process of its own: started, found by the address it logs, measured through `/proc`, stopped.

use std::collections::VecDeque;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::str::FromStr;
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use rustix::process::{Pid, Signal};

const START_TIMEOUT: Duration = Duration::from_secs(30);
/// The server promises to seal everything and exit within this after SIGTERM.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);
const LOG_TAIL_LINES: usize = 20;

pub struct SinkProcess {
    pub child: Child,
    address: SocketAddr,
    log: Arc<Mutex<VecDeque<String>>>,
    drain: Option<JoinHandle<()>>,
}

impl SinkProcess {
    /// Starts the command and waits until it logs a line with `listening` and `address=IP:PORT` on stderr, which is read to the end
    /// so that a full pipe never stops the sink.
    pub fn spawn(mut command: Command) -> anyhow::Result<Self> {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("cannot run {}", command.get_program().display()))?;
        let stderr = child.stderr.take().expect("stderr was asked for as a pipe");
        let log = Arc::new(Mutex::new(VecDeque::new()));
        let (announce, announced) = mpsc::channel();
        let drain = thread::spawn({
            let log = Arc::clone(&log);
            move || drain(stderr, &log, announce)
        });
        // From here on a failure drops the guard, which kills and reaps the child.
        let mut sink = Self { child, address: SocketAddr::from(([0, 0, 0, 0], 0)), log, drain: Some(drain) };
        match announced.recv_timeout(START_TIMEOUT) {
            Ok(address) => sink.address = address,
            Err(error) => {
                return Err(anyhow!("no address in its log: {error}; it said:\n{}", sink.log_tail()));
            }
        }
        Ok(sink)
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// User and system time of all threads since the start, to the clock tick (10 ms).
    pub fn cpu_time(&self) -> anyhow::Result<Duration> {
        let stat = self.proc_file("stat")?;
        // The command's name, in parentheses, may hold blanks; utime and stime are the 12th and 13th field behind it (proc(5)).
        let (_, fields) = stat.rsplit_once(')').context("/proc/PID/stat has no command name")?;
        let ticks = fields.split_whitespace().skip(11).take(2).map(u64::from_str).sum::<Result<u64, _>>()?;
        Ok(Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second()))
    }

    pub fn resident_kib(&self) -> anyhow::Result<u32> {
        let status = self.proc_file("status")?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS in /proc/PID/status")?;
        let kib = line.trim().strip_suffix(" kB").context("VmRSS is not in kB")?;
        Ok(kib.parse()?)
    }

    fn proc_file(&self, name: &str) -> anyhow::Result<String> {
        let path = format!("/proc/{}/{name}", self.child.id());
        fs::read_to_string(&path).with_context(|| format!("cannot read {path}: has the sink died?"))
    }

    /// Sends SIGTERM and waits; kills what does not go, and says so.
    pub fn stop(&mut self) -> anyhow::Result<Option<String>> {
        if let Some(status) = self.child.try_wait()? {
            return Ok(Some(format!("had ended before it was told to: {status}")));
        }
        rustix::process::kill_process(Pid::from_child(&self.child), Signal::TERM)?;
        let deadline = Instant::now() + STOP_TIMEOUT;
        while Instant::now() < deadline {
            if self.child.try_wait()?.is_some() {
                self.join_drain();
                return Ok(None);
            }
            thread::sleep(Duration::from_millis(10));
        }
        Ok(Some(format!("did not exit within {STOP_TIMEOUT:?} of SIGTERM and is killed")))
    }

    pub fn log_tail(&self) -> String {
        let log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        log.iter().cloned().collect::<Vec<_>>().join("\n")
    }

    fn join_drain(&mut self) {
        if self.drain.take().is_some_and(|drain| drain.join().is_err()) {
            eprintln!("the thread that reads the sink's log panicked");
        }
    }
}

impl Drop for SinkProcess {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait()
            && let Err(error) = self.child.kill().and_then(|()| self.child.wait())
        {
            eprintln!("cannot end process {}: {error}", self.child.id());
        }
        self.join_drain();
    }
}

fn drain(stderr: impl Read, log: &Mutex<VecDeque<String>>, announce: Sender<SocketAddr>) {
    let mut announce = Some(announce);
    for line in BufReader::new(stderr).split(b'\n').map_while(Result::ok) {
        let line = String::from_utf8_lossy(&line).into_owned();
        if let Some(address) = announced_address(&line)
            && announce.take().is_some_and(|announce| announce.send(address).is_err())
        {
            return; // the starter gave up and has killed the sink
        }
        let mut log = log.lock().unwrap_or_else(PoisonError::into_inner);
        if log.len() == LOG_TAIL_LINES {
            log.pop_front();
        }
        log.push_back(line);
    }
}

fn announced_address(line: &str) -> Option<SocketAddr> {
    let (_, rest) = line.split_once("address=").filter(|_| line.contains("listening"))?;
    rest.split_whitespace().next()?.trim_matches(['"', ',']).parse().ok()
}
