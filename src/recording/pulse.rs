//! Does the disk answer at all? Asked when one write does not, to tell a writer that hangs from a disk that does.
//!
//! A disk that hangs holds one thread, however many ask, and none while nobody does.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use super::root::Root;
use crate::fail_point;

/// Cheap to clone.
#[derive(Debug, Clone)]
pub struct DiskPulse {
    root: Root,
    asked: Arc<Mutex<Asked>>,
}

#[derive(Debug, Default)]
struct Asked {
    waiting: Vec<oneshot::Sender<()>>,
    is_looking: bool,
}

impl DiskPulse {
    pub fn of(root: Root) -> Self {
        Self { root, asked: Arc::default() }
    }

    /// Resolves when a file can be written below the root, or the disk says that it cannot: an answer is what is asked for. `false` if nobody could be asked.
    pub async fn answers(&self) -> bool {
        self.ask().await.is_ok()
    }

    fn ask(&self) -> oneshot::Receiver<()> {
        let (told, answer) = oneshot::channel();
        let mut asked = self.lock();
        asked.waiting.push(told);
        if !std::mem::replace(&mut asked.is_looking, true) {
            let pulse = self.clone();
            if let Err(error) = std::thread::Builder::new().name("disk-pulse".to_owned()).spawn(move || pulse.look()) {
                log::error!("whether the disk answers is not known error={error}");
                *asked = Asked::default();
            }
        }
        answer
    }

    fn look(&self) {
        fail_point::pass("disk-pulse");
        if let Err(error) = self.root.probe() {
            log::warn!("the disk answers, but takes nothing error={error}");
        }
        for waiting in std::mem::take(&mut *self.lock()).waiting {
            // The one who asked may have had its write's answer meanwhile.
            waiting.send(()).ok();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Asked> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_disk_that_works_answers_everybody_and_leaves_nothing_behind() {
        let dir = tempfile::tempdir().expect("a directory");
        let pulse = DiskPulse::of(Root::open(dir.path()).expect("a root"));
        let answers = futures_util::future::join_all((0..20).map(|_| pulse.answers())).await;
        assert!(answers.into_iter().all(|answered| answered));
        assert!(pulse.answers().await, "and again");
        assert_eq!(std::fs::read_dir(dir.path()).expect("listed").count(), 0);
    }
}
