//! A file in its first moment: nobody finds it by its name yet, and it gets one with the first of what it is for.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use chrono::{DateTime, TimeDelta, Utc};

use super::lock;
use super::root::{Directory, Root};
use super::syncer::{Syncer, Watched};

/// Files that are made until one is not taken at once by somebody who looks for what a crash left behind.
const TRIES: u32 = 10;
/// Names that are tried, a millisecond apart.
const NAMES: i64 = 1_000;

/// A file that is locked, synced each second, and has no name yet.
pub struct Unnamed {
    pub file: Arc<File>,
    pub watched: Watched,
    pub place: Place,
}

/// Where it is.
pub struct Place {
    pub directory: Directory,
    name: String,
}

impl Unnamed {
    /// Makes the file in this directory, which is made too.
    ///
    /// # Errors
    /// Whatever the file system says.
    pub fn new(root: &Root, directory: &Path, syncer: &Syncer) -> io::Result<Self> {
        Self::held_by(lock::hold, root, directory, syncer)
    }

    fn held_by(hold: impl Fn(&File) -> io::Result<bool>, root: &Root, directory: &Path, syncer: &Syncer) -> io::Result<Self> {
        let directory = root.make_directory(directory)?;
        for _ in 0..TRIES {
            let place = Place { directory: directory.clone(), name: format!(".{}.new", crate::ids::new_row_id()) };
            let file = directory.create_new(&place.name)?;
            // A repair leaves it alone from here on. One that was quicker would think the next day that nobody writes it.
            let watched = hold(&file).and_then(|is_held| {
                let file = Arc::new(file);
                is_held.then(|| syncer.watch(Arc::clone(&file)).map(|watched| (file, watched))).transpose()
            });
            match watched {
                Ok(Some((file, watched))) => return Ok(Self { file, watched, place }),
                Ok(None) => place.clear(),
                Err(error) => {
                    place.clear();
                    return Err(error);
                }
            }
        }
        Err(io::Error::new(io::ErrorKind::WouldBlock, "another process takes every file that is made"))
    }
}

impl Place {
    /// Gives the file its name, if what came first is written. It is never put in the place of another: where the name is taken, the time stamp moves on by
    /// a millisecond.
    ///
    /// # Errors
    /// Whatever the file system says; no file is left then.
    pub fn keep(self, written: io::Result<()>, time: DateTime<Utc>, name: impl Fn(DateTime<Utc>) -> PathBuf) -> io::Result<PathBuf> {
        let named = written.and_then(|()| self.give_name(time, name));
        if named.is_err() {
            self.clear();
        }
        named
    }

    fn give_name(&self, time: DateTime<Utc>, name: impl Fn(DateTime<Utc>) -> PathBuf) -> io::Result<PathBuf> {
        (0..NAMES)
            .map(|bump| name(time + TimeDelta::milliseconds(bump)))
            .find_map(|relative| match self.directory.rename_new(&self.name, &file_name(&relative)) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => None,
                Err(error) => Some(Err(error)),
                Ok(()) => Some(Ok(relative)),
            })
            .unwrap_or_else(|| Err(io::ErrorKind::AlreadyExists.into()))
    }

    fn clear(&self) {
        if let Err(left) = self.directory.remove(&self.name) {
            log::warn!("cannot remove an unfinished file name={:?} error={left}", self.name);
        }
    }
}

/// The last part of a segment's path, which is ASCII.
pub fn file_name(relative: &Path) -> String {
    relative.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::os::fd::AsRawFd;

    use super::*;

    /// The same file, opened by somebody else.
    fn opened_again(file: &File) -> File {
        File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).expect("opened")
    }

    #[test]
    fn a_file_that_a_repair_holds_in_its_first_moment_is_left_to_it_and_another_made() {
        let syncer = Syncer::start().expect("threads");
        for (quick, is_made) in [(0, true), (3, true), (1_000, false)] {
            let dir = tempfile::tempdir().expect("a directory");
            let root = Root::open(dir.path()).expect("a root");
            let repairs = RefCell::new(Vec::new());
            let hold = |file: &File| {
                if repairs.borrow().len() < quick {
                    let repair = opened_again(file);
                    assert!(lock::hold(&repair).expect("locks"));
                    repairs.borrow_mut().push(repair);
                }
                lock::hold(file)
            };
            let made = Unnamed::held_by(hold, &root, "RM_1".as_ref(), &syncer);
            let left = std::fs::read_dir(dir.path().join("RM_1")).expect("made").count();
            assert_eq!((made.is_ok(), left), (is_made, usize::from(is_made)), "{quick}");
            if let Ok(made) = made {
                assert!(!lock::hold(&opened_again(&made.file)).expect("locks"), "its writer holds it");
            }
        }
    }
}
