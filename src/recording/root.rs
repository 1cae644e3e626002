//! The directory that files are kept beneath, and the only way to them: no link beneath it is ever followed.
//!
//! It is opened once, at the start, and from then on its name matters no more: whoever may rename things around it cannot lead a recording
//! elsewhere. The root itself may be a link, since operators mount and link their storage; what that leads to is found once. If the directory is
//! deleted under the server, it is made anew where it was.

use std::ffi::OsStr;
use std::fs::{DirBuilder, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{AtFlags, Mode, OFlags, RenameFlags, ResolveFlags};
use rustix::io::Errno;

/// For the owner, and for its group to read.
const DIRECTORY_MODE: u32 = 0o750;
const FILE_MODE: u32 = 0o640;
/// `openat2` gives up where something is renamed at the same moment.
const TRIES: u32 = 16;
/// What [`Root::probe`] writes: a whole block, for a full disk still takes empty files.
const PROBE: [u8; 4096] = [0x55; 4096];

/// A directory that files are kept beneath. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Root(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// Without links, as it was found at the start.
    path: PathBuf,
    handle: Mutex<Arc<File>>,
}

/// An open directory beneath a [`Root`]. Names in it are single ones.
#[derive(Debug, Clone)]
pub struct Directory(Arc<File>);

impl Root {
    /// Opens the directory, and makes it if it is missing.
    ///
    /// # Errors
    /// What the file system says; [`io::ErrorKind::PermissionDenied`] for a directory of somebody who is neither this server's user nor root, and
    /// who could therefore put anything in its place.
    pub fn open(path: &Path) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(DIRECTORY_MODE).create(path)?;
        let path = std::fs::canonicalize(path)?;
        let handle = open_root(&path)?;
        Ok(Self(Arc::new(Inner { path, handle: Mutex::new(Arc::new(handle)) })))
    }

    /// Where it was at the start: for words, not for opening files.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// Where it is now, by the system's word, for work that goes by path: whoever moves it away does not take its files from this server.
    ///
    /// # Errors
    /// Where the system does not say.
    pub fn whereabouts(&self) -> io::Result<PathBuf> {
        std::fs::read_link(format!("/proc/self/fd/{}", self.handle().as_raw_fd()))
    }

    /// Opens a file for reading.
    ///
    /// # Errors
    /// What the file system says; also for a path that would leave the root, a link in it, and what is no ordinary file.
    pub fn open_file(&self, relative: &Path) -> io::Result<File> {
        self.ordinary_file(relative, OFlags::RDONLY)
    }

    /// Opens a file for reading and writing, and makes none.
    ///
    /// # Errors
    /// As [`Root::open_file`].
    pub fn open_to_change(&self, relative: &Path) -> io::Result<File> {
        self.ordinary_file(relative, OFlags::RDWR)
    }

    /// Opens a file for writing at its end, and makes it if it is missing.
    ///
    /// # Errors
    /// As [`Root::open_file`].
    pub fn open_to_append(&self, relative: &Path) -> io::Result<File> {
        self.ordinary_file(relative, OFlags::WRONLY | OFlags::APPEND | OFlags::CREATE)
    }

    /// Makes a file that must not be there, for reading and writing. Its directory must be there.
    ///
    /// # Errors
    /// As [`Root::open_file`]; [`io::ErrorKind::AlreadyExists`] for anything under that name, also a link that leads nowhere.
    pub fn create_new(&self, relative: &Path) -> io::Result<File> {
        self.at_root(|root| open_beneath(root, relative, OFlags::RDWR | OFlags::CREATE | OFlags::EXCL))
    }

    /// Opens a directory.
    ///
    /// # Errors
    /// As [`Root::open_file`].
    pub fn directory(&self, relative: &Path) -> io::Result<Directory> {
        self.at_root(|root| open_beneath(root, relative, OFlags::RDONLY | OFlags::DIRECTORY)).map(|directory| Directory(Arc::new(directory)))
    }

    /// Opens a directory, and makes what is missing of it. A new one is on the disk, by its name, when this returns.
    ///
    /// # Errors
    /// As [`Root::open_file`].
    pub fn make_directory(&self, relative: &Path) -> io::Result<Directory> {
        self.at_root(|root| match open_beneath(root, relative, OFlags::RDONLY | OFlags::DIRECTORY) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => make_steps(root, relative),
            outcome => outcome,
        })
        .map(|directory| Directory(Arc::new(directory)))
    }

    /// Finds out whether a recording could be begun: makes a file, writes to it, and removes it.
    ///
    /// # Errors
    /// What the file system says.
    pub fn probe(&self) -> io::Result<()> {
        use std::io::Write;
        self.at_root(|root| {
            let directory = Directory(Arc::new(root.try_clone()?));
            let name = format!(".probe-{}", uuid::Uuid::new_v4().simple());
            let written = directory.create_new(&name)?.write_all(&PROBE);
            directory.remove(&name)?;
            written
        })
    }

    /// Bytes of the file system, and those of them that are free for this server.
    ///
    /// # Errors
    /// What the file system says.
    pub fn space(&self) -> io::Result<(u64, u64)> {
        let space = self.at_root(|root| Ok(rustix::fs::fstatvfs(root)?))?;
        Ok((space.f_blocks.saturating_mul(space.f_frsize), space.f_bavail.saturating_mul(space.f_frsize)))
    }

    /// Whether the directory is still where it was at the start. If not, recordings go on in it, wherever it is now.
    ///
    /// # Errors
    /// What the file system says of the open directory.
    pub fn is_in_place(&self) -> io::Result<bool> {
        let opened = self.handle().metadata()?;
        let named = std::fs::symlink_metadata(self.path());
        Ok(named.is_ok_and(|named| (named.dev(), named.ino()) == (opened.dev(), opened.ino())))
    }

    fn ordinary_file(&self, relative: &Path, flags: OFlags) -> io::Result<File> {
        // Without waiting for whoever might write to a pipe that somebody put there.
        ordinary(self.at_root(|root| open_beneath(root, relative, flags | OFlags::NONBLOCK | OFlags::NOCTTY))?, relative)
    }

    /// The directory as a file that can be synced.
    pub fn handle(&self) -> Arc<File> {
        // Every change is one assignment, so a panic elsewhere leaves it whole.
        Arc::clone(&self.0.handle.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Works in the directory; in a new one where it has been deleted.
    fn at_root<T>(&self, work: impl Fn(&File) -> io::Result<T>) -> io::Result<T> {
        let handle = self.handle();
        match work(&handle) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && handle.metadata()?.nlink() == 0 => {
                log::error!("the directory {} was deleted under the server, it is made anew", self.path().display());
                let anew = Arc::new(open_root_anew(self.path())?);
                *self.0.handle.lock().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&anew);
                work(&anew)
            }
            outcome => outcome,
        }
    }
}

impl Directory {
    /// Makes a file that must not be there, for reading and writing.
    ///
    /// # Errors
    /// What the file system says; [`io::ErrorKind::AlreadyExists`] for anything under that name.
    pub fn create_new(&self, name: &str) -> io::Result<File> {
        open_beneath(&self.0, single(name)?, OFlags::RDWR | OFlags::CREATE | OFlags::EXCL)
    }

    /// Opens a file for reading.
    ///
    /// # Errors
    /// What the file system says; also for a link, and for what is no ordinary file.
    pub fn open_file(&self, name: &str) -> io::Result<File> {
        ordinary(open_beneath(&self.0, single(name)?, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY)?, Path::new(name))
    }

    /// Makes a file, or empties the one that is there, for writing.
    ///
    /// # Errors
    /// What the file system says; also for a link.
    pub fn create_over(&self, name: &str) -> io::Result<File> {
        open_beneath(&self.0, single(name)?, OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC)
    }

    /// Gives a finished file its name, which must be free.
    ///
    /// # Errors
    /// What the file system says; [`io::ErrorKind::AlreadyExists`] for a name that is taken.
    pub fn rename_new(&self, from: &str, to: &str) -> io::Result<()> {
        rename_at(&*self.0, single(from)?, single(to)?)
    }

    /// Puts a file in the place of whatever has its name.
    ///
    /// # Errors
    /// What the file system says.
    pub fn rename_over(&self, from: &str, to: &str) -> io::Result<()> {
        Ok(rustix::fs::renameat(&self.0, single(from)?, &self.0, single(to)?)?)
    }

    /// Removes a file.
    ///
    /// # Errors
    /// What the file system says.
    pub fn remove(&self, name: &str) -> io::Result<()> {
        Ok(rustix::fs::unlinkat(&self.0, single(name)?, AtFlags::empty())?)
    }

    /// Hands the names in it to the disk.
    ///
    /// # Errors
    /// What the file system says.
    pub fn sync(&self) -> io::Result<()> {
        self.0.sync_all()
    }

    /// The directory as a file that can be synced.
    pub fn handle(&self) -> Arc<File> {
        Arc::clone(&self.0)
    }
}

/// Gives a file another name, which must be free.
pub(super) fn rename_without_replacing(from: &Path, to: &Path) -> io::Result<()> {
    rename_at(rustix::fs::CWD, from, to)
}

fn rename_at(directory: impl AsFd, from: &Path, to: &Path) -> io::Result<()> {
    match rustix::fs::renameat_with(&directory, from, &directory, to, RenameFlags::NOREPLACE) {
        // Some network and FUSE file systems lack the flag: a hard link refuses a taken name too.
        Err(Errno::INVAL | Errno::NOSYS) => {
            rustix::fs::linkat(&directory, from, &directory, to, AtFlags::empty())?;
            Ok(rustix::fs::unlinkat(&directory, from, AtFlags::empty())?)
        }
        outcome => Ok(outcome?),
    }
}

fn ordinary(file: File, path: &Path) -> io::Result<File> {
    if file.metadata()?.is_file() {
        return Ok(file);
    }
    Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{} is no ordinary file", path.display())))
}

fn open_beneath(root: &File, relative: &Path, flags: OFlags) -> io::Result<File> {
    // `openat2` would let `..` through as long as it stays beneath.
    if relative.as_os_str().is_empty() || !relative.components().all(|component| matches!(component, Component::Normal(_))) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{} would leave its directory", relative.display())));
    }
    let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mode = if flags.contains(OFlags::CREATE) { Mode::from_raw_mode(FILE_MODE) } else { Mode::empty() };
    for _ in 0..TRIES {
        match rustix::fs::openat2(root, relative, flags, mode, ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS) {
            Err(Errno::AGAIN | Errno::INTR) => {}
            // A sandbox says EPERM; so does a file that may not be opened, and then it says so again.
            Err(Errno::NOSYS | Errno::PERM) => break,
            outcome => return Ok(outcome?.into()),
        }
    }
    open_by_steps(root, relative, flags, mode)
}

/// One component after the other: for kernels before 5.6, and for sandboxes that forbid `openat2`.
fn open_by_steps(root: &File, relative: &Path, flags: OFlags, mode: Mode) -> io::Result<File> {
    let mut components = relative.components();
    let last = components.next_back().map_or(OsStr::new(""), |last| last.as_os_str());
    let parent = descend(root, components.as_path(), step)?;
    Ok(rustix::fs::openat(&parent, last, flags, mode)?.into())
}

/// Goes down one component after the other.
fn descend(from: &File, relative: &Path, step: impl Fn(&File, &OsStr) -> io::Result<File>) -> io::Result<File> {
    relative.components().try_fold(from.try_clone()?, |directory, component| step(&directory, component.as_os_str()))
}

/// Not for reading, which directories on the way need not allow.
fn step(directory: &File, name: &OsStr) -> io::Result<File> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(directory, name, flags, Mode::empty())?.into())
}

/// The same directory, for reading.
fn readable(directory: &File) -> io::Result<File> {
    Ok(rustix::fs::openat(directory, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?.into())
}

/// Goes down, making what is missing.
fn make_steps(root: &File, relative: &Path) -> io::Result<File> {
    let made = descend(root, relative, |directory, name| {
        match rustix::fs::mkdirat(directory, name, Mode::from_raw_mode(DIRECTORY_MODE)) {
            Ok(()) => readable(directory)?.sync_all()?,
            Err(Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
        step(directory, name)
    })?;
    readable(&made)
}

/// Opens the root by a path that has no links in it, and must have none by now either.
fn open_root(path: &Path) -> io::Result<File> {
    let top = File::open("/")?;
    let relative = path.strip_prefix("/").unwrap_or(path);
    let root = if relative.as_os_str().is_empty() { top } else { open_beneath(&top, relative, OFlags::RDONLY | OFlags::DIRECTORY)? };
    let (owner, own) = (root.metadata()?.uid(), rustix::process::geteuid().as_raw());
    if owner != own && owner != 0 {
        let problem = format!("it belongs to user {owner}, who could lead recordings elsewhere; this server's user {own} or root must own it");
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, problem));
    }
    Ok(root)
}

fn open_root_anew(path: &Path) -> io::Result<File> {
    let top = File::open("/")?;
    make_steps(&top, path.strip_prefix("/").unwrap_or(path))?;
    open_root(path)
}

/// A name that cannot lead anywhere.
fn single(name: &str) -> io::Result<&Path> {
    let path = Path::new(name);
    let mut components = path.components();
    match (components.next(), components.next()) {
        (Some(Component::Normal(only)), None) if only == path.as_os_str() => Ok(path),
        _ => Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{name:?} is no file name"))),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use proptest::prelude::*;
    use tempfile::TempDir;

    use super::*;

    /// A root and what must never change, side by side.
    struct Place {
        dir: TempDir,
        root: Root,
    }

    impl Place {
        fn new() -> Self {
            let dir = tempfile::tempdir().expect("a directory");
            std::fs::create_dir_all(dir.path().join("outside/deep")).expect("made");
            std::fs::write(dir.path().join("outside/canary.wav"), "canary").expect("written");
            let root = Root::open(&dir.path().join("root")).expect("a root");
            Self { dir, root }
        }

        /// The canary's whole tree, and what else lies beside the root.
        #[track_caller]
        fn assert_untouched(&self) {
            let names = |path: &str| {
                let mut names: Vec<_> =
                    std::fs::read_dir(self.dir.path().join(path)).expect("there").map(|entry| entry.expect("an entry").file_name()).collect();
                names.sort();
                names
            };
            assert_eq!(
                (names(""), names("outside"), names("outside/deep").len()),
                (vec!["outside".into(), "root".into()], vec!["canary.wav".into(), "deep".into()], 0)
            );
            assert_eq!(std::fs::read(self.dir.path().join("outside/canary.wav")).expect("there"), b"canary");
        }
    }

    fn modes(path: &Path) -> u32 {
        std::fs::symlink_metadata(path).expect("there").mode() & 0o777
    }

    #[test]
    fn s3_files_and_directories_are_for_their_owner_and_for_its_group_to_read() {
        let place = Place::new();
        let directory = place.root.make_directory(Path::new("a/b")).expect("made");
        directory.create_new("c.wav").expect("made");
        place.root.open_to_append(Path::new("d.log")).expect("made");
        directory.rename_new("c.wav", "e.wav").expect("renamed");
        let found = ["", "a", "a/b", "a/b/e.wav", "d.log"].map(|path| modes(&place.dir.path().join("root").join(path)));
        assert_eq!(found, [0o750, 0o750, 0o750, 0o640, 0o640].map(|mode| mode & !umask()));
        assert_eq!(directory.create_new("e.wav").expect_err("taken").kind(), io::ErrorKind::AlreadyExists);
        directory.create_new("f.wav").expect("made");
        assert_eq!(directory.rename_new("f.wav", "e.wav").expect_err("taken").kind(), io::ErrorKind::AlreadyExists);
    }

    /// The tests' own, which only takes away.
    fn umask() -> u32 {
        let status = std::fs::read_to_string("/proc/self/status").expect("there");
        let line = status.lines().find_map(|line| line.strip_prefix("Umask:")).expect("a mask");
        u32::from_str_radix(line.trim(), 8).expect("a mask")
    }

    #[test]
    fn s3_no_link_is_followed_in_either_way_of_opening() {
        let place = Place::new();
        let inside = place.dir.path().join("root");
        std::fs::create_dir(inside.join("true")).expect("made");
        std::fs::write(inside.join("true/a.wav"), "a").expect("written");
        symlink("../outside", inside.join("link")).expect("linked");
        symlink("true", inside.join("harmless")).expect("linked");
        symlink("../../outside/canary.wav", inside.join("true/link.wav")).expect("linked");
        symlink("../../outside/new.wav", inside.join("true/dangling.wav")).expect("linked");
        let by_steps = |path: &str, flags| open_by_steps(&place.root.handle(), Path::new(path), flags | OFlags::NOFOLLOW, Mode::from_raw_mode(0o640));
        let make = OFlags::RDWR | OFlags::CREATE;
        assert!(place.root.open_file(Path::new("true/a.wav")).is_ok() && by_steps("true/a.wav", OFlags::RDONLY).is_ok());
        for path in ["link/canary.wav", "link/new.wav", "harmless/a.wav", "harmless/new.wav", "true/link.wav", "true/dangling.wav", "link"] {
            assert!(place.root.open_file(Path::new(path)).is_err(), "{path}");
            assert!(place.root.open_to_change(Path::new(path)).is_err(), "{path}");
            assert!(place.root.open_to_append(Path::new(path)).is_err(), "{path}");
            assert!(place.root.create_new(Path::new(path)).is_err(), "{path}");
            assert!(place.root.make_directory(&Path::new(path).join("x")).is_err(), "{path}");
            assert!(by_steps(path, OFlags::RDONLY).is_err() && by_steps(path, make).is_err(), "{path}");
        }
        assert!(place.root.directory(Path::new("link")).is_err() && place.root.make_directory(Path::new("link")).is_err());
        place.assert_untouched();
    }

    #[test]
    fn only_ordinary_files_are_opened_and_a_pipe_does_not_hold_anybody_up() {
        let place = Place::new();
        rustix::fs::mkfifoat(&*place.root.handle(), "pipe", Mode::from_raw_mode(0o600)).expect("made");
        for name in ["pipe", "."] {
            assert!(place.root.open_file(Path::new(name)).is_err(), "{name}");
        }
        place.root.make_directory(Path::new("directory")).expect("made");
        assert_eq!(place.root.open_file(Path::new("directory")).expect_err("no file").kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn s3_the_root_may_be_a_link_and_what_comes_in_its_place_later_is_not_followed() {
        let place = Place::new();
        let link = place.dir.path().join("link");
        symlink("root", &link).expect("linked");
        let root = Root::open(&link).expect("the operator's link");
        std::fs::remove_file(&link).expect("removed");
        symlink("outside", &link).expect("linked");
        root.create_new(Path::new("1.wav")).expect("made");
        let inside = place.dir.path().join("root");
        assert!(inside.join("1.wav").exists() && root.is_in_place().expect("looked"));
        std::fs::rename(&inside, place.dir.path().join("moved")).expect("moved");
        symlink("outside", &inside).expect("linked");
        root.create_new(Path::new("2.wav")).expect("made");
        assert!(place.dir.path().join("moved/2.wav").exists() && !root.is_in_place().expect("looked"));
        assert_eq!(root.whereabouts().expect("told"), place.dir.path().canonicalize().expect("there").join("moved"));
        std::fs::remove_dir_all(place.dir.path().join("moved")).expect("removed");
        // A directory is made anew only where no link leads.
        assert!(root.create_new(Path::new("3.wav")).is_err());
        for link in [inside, link] {
            std::fs::remove_file(link).expect("removed");
        }
        root.create_new(Path::new("4.wav")).expect("the directory is made anew");
        assert!(place.dir.path().join("root/4.wav").exists() && root.is_in_place().expect("looked"));
        place.assert_untouched();
    }

    #[test]
    fn s3_a_root_of_somebody_else_is_refused() {
        if !rustix::process::geteuid().is_root() {
            return eprintln!("skipped: only root can give a directory away");
        }
        let place = Place::new();
        std::os::unix::fs::chown(place.root.path(), Some(4_321), None).expect("given away");
        let error = Root::open(place.root.path()).expect_err("refused");
        assert!(error.kind() == io::ErrorKind::PermissionDenied && error.to_string().contains("user 4321"), "{error}");
    }

    #[test]
    fn probing_leaves_nothing_behind() {
        let place = Place::new();
        place.root.probe().expect("it can be written");
        assert_eq!(std::fs::read_dir(place.root.path()).expect("there").count(), 0);
        let (total, free) = place.root.space().expect("measured");
        assert!(total >= free && free > 0);
    }

    proptest! {
        #[test]
        fn s3_no_path_leads_out_of_the_root(parts in proptest::collection::vec("(\\.\\.|\\.|/|outside|canary\\.wav|link|[a-z]{1,3}|\\PC{0,4})", 1..6)) {
            let place = Place::new();
            symlink("../outside", place.dir.path().join("root/link")).expect("linked");
            for path in [parts.join("/"), parts.concat()] {
                let path = Path::new(&path);
                // Whatever comes of it, it comes of it beneath the root.
                drop((place.root.open_file(path), place.root.open_to_change(path), place.root.open_to_append(path)));
                drop((place.root.create_new(path), place.root.directory(path), place.root.make_directory(path)));
                if let Ok(directory) = place.root.directory(Path::new("a")) {
                    drop((directory.create_new(&path.to_string_lossy()), directory.remove(&path.to_string_lossy())));
                    drop((directory.rename_new(&path.to_string_lossy(), "x"), directory.rename_over("x", &path.to_string_lossy())));
                }
            }
            place.assert_untouched();
        }
    }
}
