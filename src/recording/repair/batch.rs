//! Many files at once: several threads mend them, and all of them share two syncs.

use std::fs::File;
use std::io;
use std::path::Path;
use std::time::SystemTime;

use super::{Interrupted, Mended, Mode, Outcome, Unsynced, booted_at, mend};
use crate::recording::sidecar;

/// Files that are open at a time: below the 1,024 descriptors that a process has where nobody gave it more.
const OPEN_FILES: usize = 256;
/// They wait for the disk more than they work.
const THREADS: usize = 8;

/// Repairs files below a directory, and tells what became of each, in their order. `done` hears of each stretch of them that is finished.
pub fn repair_all(directory: &Path, files: &[Interrupted], mode: Mode, mut done: impl FnMut(usize)) -> Vec<io::Result<Outcome>> {
    let booted_at = booted_at();
    let mut outcomes = Vec::with_capacity(files.len());
    for files in files.chunks(OPEN_FILES) {
        outcomes.extend(seal(directory, mend_all(files, mode, booted_at)));
        done(files.len());
    }
    outcomes
}

fn mend_all(files: &[Interrupted], mode: Mode, booted_at: Option<SystemTime>) -> Vec<io::Result<Mended>> {
    std::thread::scope(|scope| {
        let share = files.len().div_ceil(THREADS).max(1);
        let mend_share = |files: &[Interrupted]| files.iter().map(|file| mend(file, mode, booted_at)).collect::<Vec<_>>();
        let threads: Vec<_> = files.chunks(share).map(|files| (files.len(), scope.spawn(move || mend_share(files)))).collect();
        let lost = |count| (0..count).map(|_| Err(io::Error::other("the thread that repaired it panicked"))).collect();
        threads.into_iter().flat_map(|(count, thread)| thread.join().unwrap_or_else(|_| lost(count))).collect()
    })
}

/// Every file and draft reaches the disk, then every draft gets its name, then the names reach the disk: a sync for each file would cost as many times more.
fn seal(directory: &Path, mended: Vec<io::Result<Mended>>) -> Vec<io::Result<Outcome>> {
    let is_unsynced = |mended: &io::Result<Mended>| matches!(mended, Ok(Mended::Unsynced(_)));
    let synced = if mended.iter().any(is_unsynced) { sync(directory) } else { Ok(()) };
    let mut named = false;
    let outcomes = mended
        .into_iter()
        .map(|mended| match mended? {
            Mended::Ready(outcome) => Ok(outcome),
            Mended::Unsynced(mut unsynced) => {
                named = true;
                publish(&mut unsynced, synced.is_ok())?;
                Ok(Outcome::Recovered(unsynced.sidecar))
            }
        })
        .collect();
    if let Err(error) = &synced {
        log::error!("repaired files could not be synced, and are suspect directory={directory:?} error={error}");
    }
    if named && let Err(error) = sync(directory) {
        log::error!("the sidecars of repaired files could not be synced directory={directory:?} error={error}");
    }
    outcomes
}

/// A sync that fails names no file, and is not tried again: the next one would succeed without having written anything.
fn publish(unsynced: &mut Unsynced, synced: bool) -> io::Result<()> {
    if !synced {
        unsynced.sidecar.suspect = true;
        unsynced.sidecar.draft(&unsynced.path)?;
    }
    sidecar::publish(&unsynced.path)
}

fn sync(directory: &Path) -> io::Result<()> {
    Ok(rustix::fs::syncfs(File::open(directory)?)?)
}
