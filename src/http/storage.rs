//! Can recordings be written? Asked by every connection and by `/health`, found out at most once a second.

use std::sync::Arc;
use std::time::{Duration, Instant};

use actix_rt::task::{JoinHandle, spawn_blocking};
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
    /// A look that has not come back.
    looking: Option<JoinHandle<Look>>,
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
        let mut looking = last.looking.take().unwrap_or_else(|| {
            let disk = Arc::clone(&self.disk);
            spawn_blocking(move || disk.look())
        });
        let failed = |problem| Look { problem: Some(problem), moved: None };
        let look = match tokio::time::timeout(DEADLINE, &mut looking).await {
            Ok(Ok(look)) => look,
            Ok(Err(error)) => failed(error.to_string()),
            Err(_) => {
                last.looking = Some(looking);
                failed(format!("no answer within {} s", DEADLINE.as_secs()))
            }
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
