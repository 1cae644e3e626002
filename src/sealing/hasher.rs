//! The SHA-256 of finished files, which nobody waits for.
//!
//! One thread of the lowest priority reads file after file, writes what it found into the sidecar, and then into the row. Which files have none the rows tell, so a
//! restart goes on where it was; files that the database does not know are looked for once, when what an earlier run left of them is sealed. A sidecar that is missing, because the disk was full when its file was sealed, is made of the row.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use super::sidecar_by_row;
use crate::db::rows::seals::SegmentInContext;
use crate::db::{DbError, Store};
use crate::fail_point;
use crate::ids::SegmentId;
use crate::recording::hash::sha256_of;
use crate::recording::notes::{self, Known};
use crate::recording::repair::look;
use crate::recording::root::{Directory, Root};
use crate::recording::sidecar::{MediaFormat, Sidecar};
use crate::video::codec::Container;

/// Rows that are read at once.
const PAGE: i64 = 100;
/// Hashes of so long go into their rows together: a commit costs as much as a small file.
const TOGETHER: Duration = Duration::from_secs(1);
/// Files that are asked for at once.
const ASKED: usize = 500;
/// When what failed is tried again, if nothing else wakes the thread.
const RETRY: Duration = Duration::from_secs(300);
/// Of the thread: 19 yields to everything.
const NICENESS: i32 = 19;

/// Where the files of a format are.
#[derive(Debug, Clone)]
pub struct Shelf {
    /// As rows name it.
    pub format: &'static str,
    pub media: MediaFormat,
    pub root: Root,
}

impl Shelf {
    /// Another kind of files may be in the same directory.
    pub fn holds(&self, path: &Path) -> bool {
        Container::of(path).as_str() == self.format
    }

    /// Where a file lies, by its path beneath the shelf: no link leads anywhere else.
    fn place<'a>(&self, relative: &'a Path) -> io::Result<(Directory, &'a str)> {
        let (parent, name) = relative.parent().zip(relative.file_name().and_then(OsStr::to_str)).ok_or(io::ErrorKind::InvalidInput)?;
        Ok((self.root.directory(parent)?, name))
    }
}

/// The thread's handle. It ends with [`Hasher::stop`], or with the process.
pub struct Hasher {
    stop: Arc<AtomicBool>,
    store: Store,
}

impl Hasher {
    /// `strays_are_sealed` becomes true, and the store tells it as the end of segments.
    ///
    /// # Errors
    /// When no thread can be made.
    pub fn start(store: Store, shelves: Vec<Shelf>, strays_are_sealed: Arc<AtomicBool>) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
        let stop = Arc::<AtomicBool>::default();
        let worker =
            Worker { store: store.clone(), shelves, strays_are_sealed, stop: Arc::clone(&stop), failed: HashSet::new(), spoilt: HashSet::new() };
        std::thread::Builder::new().name("hasher".to_owned()).spawn(move || {
            // On Linux, none is the calling thread alone.
            if let Err(error) = rustix::process::setpriority_process(None, NICENESS) {
                log::debug!("hashing has no low priority error={error}");
            }
            runtime.block_on(worker.run());
        })?;
        Ok(Self { stop, store })
    }

    /// Lets the thread end soon, in the middle of a file if need be. Returns at once.
    pub fn stop(&self) {
        self.stop.store(true, Relaxed);
        self.store.note_segments_ended();
    }
}

struct Worker {
    store: Store,
    shelves: Vec<Shelf>,
    strays_are_sealed: Arc<AtomicBool>,
    stop: Arc<AtomicBool>,
    /// Files that could not be hashed, until they are tried again.
    failed: HashSet<String>,
    /// Files that are not as long as they were sealed: said once, and looked at again by the next start.
    spoilt: HashSet<String>,
}

/// What came of a file.
enum Outcome {
    /// The digest, which the sidecar has.
    Hashed(String),
    /// Told to stop.
    Stopped,
    /// It is not as long as it was sealed, and a digest would vouch for what it is now.
    Spoilt,
}

impl Worker {
    async fn run(mut self) {
        let (mut looked, mut tried) = (false, Instant::now());
        while !self.stop.load(Relaxed) {
            let mut hashed = self.pass().await;
            if hashed.is_ok() && self.strays_are_sealed.load(Relaxed) && !std::mem::replace(&mut looked, true) {
                hashed = self.strays().await;
            }
            if let Err(error) = hashed {
                log::warn!("hashing waits for the database error={error}");
            }
            if self.stop.load(Relaxed) {
                break;
            }
            // Woken or not: there may always be somebody who ends.
            tokio::time::timeout(RETRY.saturating_sub(tried.elapsed()), self.store.segments_ended()).await.ok();
            if tried.elapsed() >= RETRY {
                self.failed.clear();
                tried = Instant::now();
            }
        }
    }

    /// Hashes whatever has no hash.
    async fn pass(&mut self) -> Result<(), DbError> {
        let formats: Vec<&'static str> = self.shelves.iter().map(|shelf| shelf.format).collect();
        let (mut after, mut hashed, mut since) = (String::new(), Vec::new(), Instant::now());
        loop {
            let rows = self.store.without_hash(formats.clone(), after, PAGE).await?;
            let Some(last) = rows.last() else { return self.store.set_hashes(hashed).await };
            after = last.segment.id.clone();
            for row in rows {
                if since.elapsed() > TOGETHER {
                    self.store.set_hashes(std::mem::take(&mut hashed)).await?;
                    since = Instant::now();
                }
                let id = row.segment.id.clone();
                if self.failed.contains(&id) || self.spoilt.contains(&id) {
                    continue;
                }
                match self.hash(row) {
                    Ok(Outcome::Hashed(sha256)) => hashed.push((SegmentId::new(id), sha256)),
                    Ok(Outcome::Stopped) => return self.store.set_hashes(hashed).await,
                    Ok(Outcome::Spoilt) => {
                        self.store.call_suspect(SegmentId::new(id.clone())).await?;
                        self.spoilt.insert(id);
                    }
                    Err(error) => {
                        // Who moved it away knows.
                        let level = if error.kind() == io::ErrorKind::NotFound { log::Level::Debug } else { log::Level::Warn };
                        log::log!(level, "a finished file cannot be hashed segment_id={id} error={error}");
                        self.failed.insert(id);
                    }
                }
            }
        }
    }

    fn hash(&self, row: SegmentInContext) -> io::Result<Outcome> {
        // One file's trouble is not that of the files behind it.
        catch_unwind(AssertUnwindSafe(|| self.hash_file(row))).unwrap_or_else(|_| Err(io::Error::other("hashing it panicked")))
    }

    fn hash_file(&self, row: SegmentInContext) -> io::Result<Outcome> {
        fail_point::pass("hasher-file");
        let shelf = self.shelves.iter().find(|shelf| shelf.format == row.segment.format).ok_or(io::ErrorKind::NotFound)?;
        let path = PathBuf::from(&row.segment.path);
        let (directory, name) = shelf.place(&path)?;
        let is_suspect = row.seal.as_ref().is_some_and(|seal| seal.suspect);
        let beside = Sidecar::read_in(&directory, name)?;
        // Killed before the row had it.
        if let Some(sidecar) = &beside
            && let Some(sha256) = &sidecar.sha256
        {
            remove_notes(&directory, name, sidecar);
            return Ok(Outcome::Hashed(sha256.clone()));
        }
        let is_beside = beside.is_some();
        let sidecar = match beside {
            // A repair may not have known what the row does.
            Some(sidecar) => Sidecar { suspect: sidecar.suspect || is_suspect, ..sidecar },
            None => by_row(row, shelf.media)?,
        };
        complete(&directory, name, sidecar, is_beside, &self.stop)
    }

    /// The same of a file of which the database knows nothing.
    fn hash_stray(&self, shelf: &Shelf, path: &Path) -> io::Result<()> {
        let (directory, name) = shelf.place(path.strip_prefix(shelf.root.path()).unwrap_or(path))?;
        match Sidecar::read_in(&directory, name)? {
            Some(sidecar) if sidecar.sha256.is_none() => complete(&directory, name, sidecar, true, &self.stop).map(drop),
            Some(_) | None => Ok(()),
        }
    }

    /// Finished files that the database does not know: found once, by looking.
    async fn strays(&self) -> Result<(), DbError> {
        for shelf in &self.shelves {
            let relative = |path: &Path| path.strip_prefix(shelf.root.path()).unwrap_or(path).to_string_lossy().into_owned();
            let mut sealed = look(shelf.root.path()).sealed;
            sealed.retain(|path| shelf.holds(path));
            for paths in sealed.chunks(ASKED) {
                let names: Vec<String> = paths.iter().map(|path| relative(path)).collect();
                let known: HashSet<String> = self.store.paths_with_rows(shelf.format, names).await?.into_iter().collect();
                for path in paths.iter().filter(|path| !known.contains(&relative(path))) {
                    if let Err(error) = self.hash_stray(shelf, path) {
                        log::warn!("a finished file cannot be hashed path={path:?} error={error}");
                    }
                    if self.stop.load(Relaxed) {
                        return Ok(());
                    }
                }
            }
        }
        Ok(())
    }
}

/// The digest goes into the sidecar.
fn complete(directory: &Directory, name: &str, sidecar: Sidecar, is_beside: bool, stop: &AtomicBool) -> io::Result<Outcome> {
    let started = Instant::now();
    let Some(hashed) = sha256_of(directory.open_file(name)?, stop)? else { return Ok(Outcome::Stopped) };
    // What a repair could not use stays behind what it could.
    let is_as_sealed = hashed.bytes == sidecar.file_bytes() || sidecar.recovered && hashed.bytes > sidecar.file_bytes();
    if !is_as_sealed {
        let (bytes, sealed) = (hashed.bytes, sidecar.file_bytes());
        log::error!(
            "a finished file is not as long as it was sealed, it gets no hash and is suspect file={name:?} bytes={bytes} sealed_bytes={sealed}"
        );
        // A file whose sidecar would be made of its row may still be repaired by hand.
        if is_beside {
            Sidecar { suspect: true, ..sidecar }.write_in(directory, name)?;
        }
        return Ok(Outcome::Spoilt);
    }
    let sidecar = Sidecar { sha256: Some(hashed.sha256.clone()), ..sidecar };
    sidecar.write_in(directory, name)?;
    remove_notes(directory, name, &sidecar);
    log::debug!("hashed a finished file file={name:?} bytes={} took_ms={}", hashed.bytes, started.elapsed().as_millis());
    Ok(Outcome::Hashed(hashed.sha256))
}

/// Of a file that got its sidecar only now, or whose end was interrupted right behind it. What a repair could not read stays, for somebody to look at; who
/// finished a file himself knew all of it.
fn remove_notes(directory: &Directory, name: &str, sidecar: &Sidecar) {
    let is_told =
        |noted: &Known| noted.in_file(sidecar.frames, sidecar.format != MediaFormat::Wav) == (sidecar.gaps.clone(), sidecar.mute_spans.clone());
    if !sidecar.recovered || notes::read_in(directory, name).is_ok_and(|noted| is_told(&noted)) {
        notes::remove(directory, name);
    }
}

fn by_row(row: SegmentInContext, media: MediaFormat) -> io::Result<Sidecar> {
    let ended_at = row.segment.ended_at.ok_or(io::ErrorKind::InvalidData)?.and_utc();
    Ok(sidecar_by_row(row, media, ended_at))
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::super::{Origin, sidecar_of};
    use super::*;
    use crate::audio::format::PcmFormat;
    use crate::db::rows::seals::Seal;
    use crate::db::rows::{ClosedSegment, EndReason};
    use crate::recording::path::SegmentName;

    /// A directory for a WAV file of 10 frames, and what its sidecar is to say.
    fn stage(recovered: bool) -> (tempfile::TempDir, Directory, Sidecar) {
        let dir = tempfile::tempdir().expect("a directory");
        let directory = Root::open(dir.path()).and_then(|root| root.make_directory("RM".as_ref())).expect("a directory");
        let closed = ClosedSegment {
            id: SegmentId::new("1"),
            format: PcmFormat::LIVEKIT,
            frames: 10,
            bytes: 40,
            ended_at: DateTime::UNIX_EPOCH,
            reason: EndReason::Closed,
            gaps: Vec::new(),
            seal: Seal { recovered, ..Seal::default() },
        };
        let name = SegmentName { meeting: "RM".to_owned(), room: "room".to_owned(), participant: None, track: None };
        let origin = Origin { name, file: "x.wav".to_owned(), format: MediaFormat::Wav, started_at: DateTime::UNIX_EPOCH };
        (dir, directory, sidecar_of(&closed, origin))
    }

    #[test]
    fn d8_a_file_that_is_not_as_long_as_it_was_sealed_gets_no_hash() {
        let go = AtomicBool::new(false);
        for (length, is_beside) in [(84, true), (84, false), (80, true), (88, true), (80, false)] {
            let (dir, directory, sidecar) = stage(false);
            std::fs::write(dir.path().join("RM/x.wav"), vec![0; length]).expect("written");
            let outcome = complete(&directory, "x.wav", sidecar, is_beside, &go).expect("no fault");
            let told = Sidecar::read_in(&directory, "x.wav").expect("read").map(|told| (told.sha256.is_some(), told.suspect));
            let is_whole = length == 84;
            assert_eq!(matches!(outcome, Outcome::Hashed(_)), is_whole, "{length}");
            assert_eq!(told, (is_whole || is_beside).then_some((is_whole, !is_whole)), "{length}");
        }
    }

    #[test]
    fn only_notes_of_which_the_sidecar_tells_all_are_removed() {
        let gap = r#"{"keptGaps":0,"gaps":[{"startFrame":1,"frames":2,"reason":"missing"}],"putInFront":0,"keptMuteSpans":0,"muteSpans":[],"first":0,"suspect":false}"#;
        for (recovered, noted, is_left) in [(false, gap, false), (true, "", false), (true, "torn", false), (true, gap, true)] {
            let (dir, directory, sidecar) = stage(recovered);
            let notes = dir.path().join("RM/.x.wav.notes");
            std::fs::write(&notes, noted).expect("written");
            remove_notes(&directory, "x.wav", &sidecar);
            assert_eq!(notes.exists(), is_left, "{recovered} {noted}");
        }
        let (dir, directory, sidecar) = stage(true);
        let notes = dir.path().join("RM/.x.wav.notes");
        std::os::unix::fs::symlink("nowhere", &notes).expect("linked");
        remove_notes(&directory, "x.wav", &sidecar);
        assert!(std::fs::symlink_metadata(&notes).is_ok(), "what nobody can read is left");
    }
}
