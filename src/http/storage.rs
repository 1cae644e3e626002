//! Can recordings be written? Asked by every connection and by `/health`, found out at most once a second.

use std::sync::Arc;
use std::time::{Duration, Instant};

use actix_rt::task::{JoinError, JoinHandle, spawn_blocking};
use tokio::sync::Mutex;

use crate::recording::disk::{Disk, Look};

/// How long the disk may take to answer.
const DEADLINE: Duration = Duration::from_secs(1);
/// Askers within this share one answer, or a shorter time if it is a bad one: what was in the way may be gone, as a lack of descriptors is.
const FRESH: Duration = Duration::from_secs(1);
const FRESH_PROBLEM: Duration = Duration::from_millis(100);
/// How often the room on the disk is measured.
const MEASURED_EVERY: Duration = Duration::from_secs(1);

/// Looks at the disk, one look at a time: a disk that hangs holds one thread, however many ask.
#[derive(Debug)]
pub struct Storage {
    disk: Arc<Disk>,
    last: Mutex<Last>,
}

#[derive(Debug, Default)]
struct Last {
    known: Option<(Instant, Look)>,
    looking: OneLook<Look>,
}

/// A look at a disk that may hang, in a thread: whoever asks before it has come back waits for the same one.
#[derive(Debug)]
pub struct OneLook<T>(Option<(Instant, JoinHandle<T>)>);

impl<T> Default for OneLook<T> {
    fn default() -> Self {
        Self(None)
    }
}

impl<T: Send + 'static> OneLook<T> {
    /// `None` for one that does not come back in time. It stays, also when whoever waits goes.
    pub async fn within(&mut self, deadline: Duration, look: impl FnOnce() -> T + Send + 'static) -> Option<Result<T, JoinError>> {
        // One that has come back when nobody waited tells how it was then.
        self.0.take_if(|(began, looking)| looking.is_finished() && began.elapsed() > deadline);
        let (_, looking) = self.0.get_or_insert_with(|| (Instant::now(), spawn_blocking(look)));
        let found = tokio::time::timeout(deadline, looking).await.ok()?;
        self.0 = None;
        Some(found)
    }
}

impl Storage {
    pub fn new(disk: Arc<Disk>) -> Self {
        Self { disk, last: Mutex::default() }
    }

    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    /// Whether recordings can be written.
    pub async fn look(&self) -> Look {
        let mut last = self.last.lock().await;
        if let Some((at, look)) = &last.known
            && at.elapsed() < if look.problem.is_none() { FRESH } else { FRESH_PROBLEM }
        {
            return look.clone();
        }
        let failed = |problem| Look { problem: Some(problem), moved: None };
        let disk = Arc::clone(&self.disk);
        let look = match last.looking.within(DEADLINE, move || disk.look()).await {
            Some(Ok(look)) => look,
            Some(Err(error)) => failed(error.to_string()),
            None => failed(format!("no answer within {} s", DEADLINE.as_secs())),
        };
        last.known = Some((Instant::now(), look.clone()));
        look
    }
}

/// Measures the room on the disk each second, for as long as the server runs.
pub async fn keep_measuring(disk: Arc<Disk>) {
    let mut failing = false;
    loop {
        tokio::time::sleep(MEASURED_EVERY).await;
        let measured = {
            let disk = Arc::clone(&disk);
            spawn_blocking(move || disk.measure()).await
        };
        match measured {
            Ok(Ok(_)) => failing = false,
            Ok(Err(error)) => {
                if !std::mem::replace(&mut failing, true) {
                    log::error!("the room for recordings cannot be measured error={error}");
                }
            }
            Err(error) => return log::error!("the room for recordings is measured no more error={error}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
    use std::sync::mpsc;

    use super::*;

    #[tokio::test]
    async fn a_disk_that_hangs_holds_one_thread_however_many_ask_and_however_long_they_wait() {
        let (begun, (answer, answered)) = (Arc::new(AtomicUsize::new(0)), mpsc::channel());
        let answered = Arc::new(std::sync::Mutex::new(answered));
        let look = || {
            let (begun, answered) = (Arc::clone(&begun), Arc::clone(&answered));
            move || {
                begun.fetch_add(1, SeqCst);
                answered.lock().expect("unpoisoned").recv().expect("answered")
            }
        };
        let mut one = OneLook::default();
        for _ in 0..3 {
            assert!(one.within(Duration::ZERO, look()).await.is_none());
            // One who goes before the deadline.
            assert!(tokio::time::timeout(Duration::ZERO, one.within(Duration::from_secs(3_600), look())).await.is_err());
        }
        answer.send(7).expect("awaited");
        assert_eq!(one.within(Duration::from_secs(20), look()).await.expect("it came back").expect("no panic"), 7);
        assert_eq!(begun.load(SeqCst), 1);
        answer.send(8).expect("awaited");
        assert_eq!(one.within(Duration::from_secs(20), look()).await.expect("the next").expect("no panic"), 8);
    }
}
