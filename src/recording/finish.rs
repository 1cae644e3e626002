//! The end of a file: on the disk with its name first, and then its sidecar.

use std::fs::File;
use std::io;
use std::sync::Arc;

use super::root::Directory;
use super::sidecar::Sidecar;
use super::syncer::Syncer;

/// A file that is cut to its length, its name, and the directory of that.
pub struct Finished {
    pub file: Arc<File>,
    pub directory: Directory,
    pub name: String,
}

impl Finished {
    /// Hands the file, its name and the draft of its sidecar to the disk, all at once, and only then gives the draft its name: two waits, which files that
    /// end together share.
    ///
    /// # Errors
    /// What the disk says of the file. One without a sidecar is no error: it gets it later.
    pub fn seal(self, syncer: &Syncer, sidecar: &Sidecar) -> io::Result<()> {
        let Self { file, directory, name } = self;
        let mut all = vec![file, directory.handle()];
        // A draft says nothing to anybody before it has its name.
        let drafted = sidecar.draft_in(&directory, &name).map(|draft| all.push(Arc::new(draft)));
        let mut outcomes = syncer.sync_together(all).into_iter();
        for _ in 0..2 {
            if let Some(Err(error)) = outcomes.next() {
                Sidecar::discard_in(&directory, &name);
                return Err(error);
            }
        }
        let named = drafted.and_then(|()| outcomes.next().unwrap_or(Ok(()))).and_then(|()| Sidecar::publish_in(&directory, &name));
        if let Err(error) = named.and_then(|()| syncer.sync_now(directory.handle())) {
            log::error!("a finished file has no sidecar yet file={name:?} error={error}");
        }
        Ok(())
    }
}
