//! The floor beside a server: how long its machine let nobody write.

use std::io::Write;
use std::path::Path;
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// What its small file wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wants {
    /// The page cache, as an append does.
    Pages,
    /// The disk, as a seal does.
    Disk,
}

/// Somebody who only makes a small file now and then.
pub struct Stalls {
    over: mpsc::Sender<()>,
    thread: std::thread::JoinHandle<Vec<(Instant, Instant)>>,
}

impl Stalls {
    const EVERY: Duration = Duration::from_millis(20);

    pub fn watch(directory: &Path, wants: Wants) -> Self {
        let (over, ended) = mpsc::channel();
        let path = directory.join("stalls");
        let thread = std::thread::spawn(move || {
            let mut waits = Vec::new();
            let mut before = Instant::now();
            loop {
                let goes_on = ended.recv_timeout(Self::EVERY) == Err(mpsc::RecvTimeoutError::Timeout);
                let mut file = std::fs::File::create(&path).unwrap();
                file.write_all(&[1; 4096]).unwrap();
                if wants == Wants::Disk {
                    file.sync_all().unwrap();
                }
                std::fs::remove_file(&path).unwrap();
                waits.push((before, Instant::now()));
                before = Instant::now();
                if !goes_on {
                    return waits;
                }
            }
        });
        Self { over, thread }
    }

    /// The longest that machine and disk let it wait in the last second before `killed`: what came earlier is in its file.
    pub fn longest_before(self, killed: Instant) -> Duration {
        drop(self.over);
        let waits = self.thread.join().unwrap();
        let of_interest = waits.into_iter().filter(|(began, ended)| *began < killed && *ended + Duration::from_secs(1) > killed);
        of_interest.map(|(began, ended)| ended.min(killed).duration_since(began).saturating_sub(Self::EVERY)).max().unwrap_or_default()
    }

    /// The longest that it had to wait.
    pub fn longest(self) -> Duration {
        drop(self.over);
        let waits = self.thread.join().unwrap();
        waits.into_iter().map(|(began, ended)| (ended - began).saturating_sub(Self::EVERY)).max().unwrap_or_default()
    }
}
