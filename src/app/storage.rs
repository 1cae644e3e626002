//! The directories of recordings, as the server starts with them.

use std::io::{self, ErrorKind};
use std::path::Path;
use std::sync::Arc;

use super::StartError;
use crate::config::Config;
use crate::recording::disk::Disk;
use crate::recording::root::Root;
use crate::recording::syncer::Syncer;
use crate::sealing::hasher::Shelf;
use crate::video::codec::Container;

/// Opens a directory that files are made in.
pub fn directory(path: &Path) -> Result<Root, StartError> {
    let error = |what| move |cause| StartError::File { what, path: path.display().to_string(), cause };
    let root = Root::open(path).map_err(error("cannot use directory"))?;
    match root.probe() {
        Err(problem) if matches!(problem.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded) => {
            // What is kept there can be served all the same, and there may be space again.
            log::error!("nothing can be written for want of space directory={:?} error={problem}", root.path());
            Ok(root)
        }
        probed => probed.map(|()| root).map_err(error("cannot write to directory")),
    }
}

/// Where files of each kind are.
pub fn shelves(audio: &Root, video: &Root) -> Vec<Shelf> {
    let shelf = |container: Container| {
        let root = if container.is_video() { video } else { audio };
        Shelf { format: container.as_str(), media: container.into(), root: root.clone() }
    };
    [Container::Wav, Container::H264, Container::Ivf].map(shelf).into()
}

pub fn disk(config: &Config, root: Root) -> Arc<Disk> {
    let disk = Disk::new(root, config.storage.min_free);
    if let Err(error) = disk.measure() {
        log::error!("the room for recordings cannot be measured error={error}");
    }
    Arc::new(disk)
}

/// What hands the files below these directories to the disk.
pub fn syncer(roots: [&Root; 2]) -> io::Result<Syncer> {
    let syncer = Syncer::start()?;
    roots.into_iter().try_for_each(|root| syncer.keep(root.handle()))?;
    Ok(syncer)
}
