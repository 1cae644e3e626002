//! The end of a file: on the disk with its name first, and then its sidecar.

use std::fs::File;
use std::io;
use std::sync::Arc;

use super::root::Directory;
use super::sidecar::Sidecar;
use super::syncer::{Syncer, Watched};
use super::{moving, notes};

/// A file that is cut to its length, its name, and the directory of that. Until this is dropped no repair touches the file, for it is locked.
pub struct Finished {
    pub file: Arc<File>,
    pub watched: Watched,
    pub directory: Directory,
    pub name: String,
}

impl Finished {
    /// Hands the file, its name and the draft of its sidecar to the disk, all at once, and only then gives the draft its name: two waits, which files that
    /// end together share.
    ///
    /// # Errors
    /// What the disk says of the file, now or at any earlier sync: then its sidecar calls it suspect. One without a sidecar is no error: it gets it later.
    pub fn seal(self, syncer: &Syncer, sidecar: Sidecar) -> io::Result<()> {
        let Self { file, watched, directory, name } = &self;
        let mut all = vec![Arc::clone(file), directory.handle()];
        // A draft says nothing to anybody before it has its name.
        let drafted = sidecar.draft_in(directory, name).map(|draft| all.push(Arc::new(draft)));
        let mut outcomes = syncer.sync_together(all).into_iter();
        let on_disk = outcomes.by_ref().take(2).collect::<io::Result<()>>().and_then(|()| syncer.settle(watched));
        if let Err(error) = on_disk {
            self.call_suspect(sidecar);
            return Err(error);
        }
        moving::remove(directory, name);
        let named = drafted.and_then(|()| outcomes.next().unwrap_or(Ok(()))).and_then(|()| Sidecar::publish_in(directory, name));
        if let Err(error) = named.and_then(|()| syncer.sync_now(directory.handle())) {
            log::error!("a finished file has no sidecar yet file={name:?} error={error}");
        } else {
            notes::remove(directory, name);
        }
        Ok(())
    }

    /// Nobody asks the disk again, who would be told that all is well.
    fn call_suspect(&self, sidecar: Sidecar) {
        moving::remove(&self.directory, &self.name);
        let suspect = Sidecar { suspect: true, end_reason: "failed".to_owned(), ..sidecar };
        if let Err(error) = suspect.write_in(&self.directory, &self.name) {
            log::error!("a suspect file has no sidecar yet file={:?} error={error}", self.name);
        } else {
            notes::remove(&self.directory, &self.name);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::recording::root::Root;

    /// One that the system cannot sync.
    fn pipe() -> Arc<File> {
        let (_, pipe) = std::io::pipe().expect("a pipe");
        Arc::new(File::from(std::os::fd::OwnedFd::from(pipe)))
    }

    fn sidecar(suspect: bool, reason: &str) -> Sidecar {
        let text = format!(
            r#"{{"version":1,"file":"x.wav","format":"wav","frames":0,"bytes":0,"startedAt":"2026-11-20T10:53:12Z","endedAt":"2026-11-20T10:53:12Z",
                "gaps":[],"muteSpans":[],"endReason":"{reason}","recovered":false,"suspect":{suspect},"tailUnverifiedMs":0}}"#
        );
        serde_json::from_str(&text).expect("a sidecar")
    }

    #[tokio::test]
    async fn d5_a_file_of_which_any_sync_failed_is_sealed_as_suspect() {
        let syncer = Syncer::start().expect("threads");
        for (now, before) in [(false, false), (true, false), (false, true)] {
            let dir = tempfile::tempdir().expect("a directory");
            let directory = Root::open(dir.path()).and_then(|root| root.make_directory("RM_1".as_ref())).expect("a directory");
            let own = Arc::new(directory.create_new("x.wav").expect("made"));
            let watched = syncer.watch(if before { pipe() } else { Arc::clone(&own) }).expect("watched");
            let failed = async {
                while before && !watched.has_failed() {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            };
            tokio::time::timeout(Duration::from_secs(4), failed).await.expect("it is synced each second");
            let finished = Finished { file: if now { pipe() } else { own }, watched, directory, name: "x.wav".to_owned() };
            let syncer = syncer.clone();
            let sealed = tokio::task::spawn_blocking(move || finished.seal(&syncer, sidecar(false, "closed"))).await.expect("a thread");
            let told = Sidecar::read(&dir.path().join("RM_1/x.wav")).expect("read").expect("there");
            let is_suspect = now || before;
            assert_eq!((sealed.is_err(), told), (is_suspect, sidecar(is_suspect, if is_suspect { "failed" } else { "closed" })));
        }
    }
}
