//! What an earlier run of this server left open is sealed before anything else: the files know how long they are.
//!
//! Files first, then the sidecars, then the rows, each many at a time. Killed at any point, the next start comes to the same end. What cannot be repaired
//! then, because another process writes it or the disk fails, is tried again while the server works.
//!
//! Before the server listens only the files of open rows are opened, no more than were live. Those that no row speaks of are found by walking through the
//! whole archive, which may take minutes: they are looked for while the server works. Its own recordings are told from them by the lock of their writers.

use std::collections::HashSet;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant, SystemTime};

use chrono::{DateTime, Utc};

use super::closed_by;
use super::hasher::Shelf;
use crate::audio::format::PcmFormat;
use crate::db::rows::seals::{Seal, SegmentInContext};
use crate::db::rows::{ClosedSegment, EndReason};
use crate::db::{DbError, Store};
use crate::ids::{RecordingId, SegmentId, new_row_id};
use crate::recording::lock;
use crate::recording::path::{below, straight_below};
use crate::recording::repair::{Adopted, Found, Interrupted, Mode, Outcome, adopt, look, repair_all, repair_each};
use crate::recording::root::Root;
use crate::video::codec::Container;

/// Rows that one transaction ends: few commits, none of them long.
const ROWS_AT_ONCE: usize = 250;

/// How soon what cannot be repaired at the start is tried again. Each time it takes twice as long as before, for it reads whole files.
const RETRY: Duration = Duration::from_secs(5);
const SLOWEST_RETRY: Duration = Duration::from_secs(300);
/// How far the clock that files are stamped by may be behind: a tick of the slowest kernel.
const TICK: Duration = Duration::from_millis(10);

/// What an earlier run left open on one shelf.
#[derive(Debug, Clone)]
pub struct Leftovers {
    shelf: Shelf,
    rows: Vec<SegmentInContext>,
    /// Of which the database never heard.
    files: Vec<PathBuf>,
}

/// Files that wait for their repair, as health and the metrics tell.
pub type Unrepaired = Arc<AtomicU64>;

/// What is still to be done when the server listens.
#[derive(Debug)]
pub struct Remaining {
    /// What another process writes, or the disk does not let be repaired now.
    left: Vec<Leftovers>,
    /// Where nobody has looked yet for files that no row speaks of.
    unseen: Vec<Shelf>,
    /// When this run began. What is younger is its own.
    since: SystemTime,
    unrepaired: Unrepaired,
    looked: Arc<AtomicBool>,
}

impl Remaining {
    pub fn unrepaired(&self) -> Unrepaired {
        Arc::clone(&self.unrepaired)
    }

    /// Whether all files have been looked for. Who waits for it is woken as by the end of segments.
    pub fn looked(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.looked)
    }
}

/// When files are repaired.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum When {
    /// As quickly as can be.
    AtStart,
    /// Beside the work, for the first time. As at the start, why one is left is told.
    Beside,
    Again,
}

impl When {
    fn level(self) -> log::Level {
        match self {
            Self::AtStart | Self::Beside => log::Level::Error,
            Self::Again => log::Level::Debug,
        }
    }
}

/// Seals the files that an earlier run of this server left open, and ends their rows. Of those of which the database never heard nothing is done yet, but
/// where the file system knows no locks: there they could not be told from the recordings of this run.
///
/// # Errors
/// What the database says. What is wrong with a file is logged.
pub async fn recover(store: &Store, shelves: &[Shelf]) -> Result<Remaining, DbError> {
    let since = SystemTime::now() - TICK;
    let (mut left, mut unseen) = (Vec::new(), Vec::new());
    for shelf in shelves {
        let rows = store.interrupted_segments(shelf.format).await?;
        let root = shelf.root.clone();
        let files = if tokio::task::spawn_blocking(move || knows_locks(&root)).await? {
            unseen.push(shelf.clone());
            Vec::new()
        } else {
            log::warn!(
                "files are not told from those that are written by locks, so the start looks at every recording directory={:?}",
                shelf.root.path()
            );
            files_without_rows(store, shelf, since).await?
        };
        left.push(Leftovers { shelf: shelf.clone(), rows, files }.repair(store, When::AtStart).await?);
    }
    close_recordings(store, store.open_recordings().await?).await?;
    left.retain(|left| left.count() > 0);
    let unrepaired = Arc::new(AtomicU64::new(left.iter().map(Leftovers::count).sum()));
    Ok(Remaining { left, unseen, since, unrepaired, looked: Arc::default() })
}

/// Looks for the files of which the database never heard and seals them, and tries again what could not be repaired until nothing is left.
pub async fn go_on(store: Store, remaining: Remaining) {
    let Remaining { left, unseen, since, unrepaired, looked } = remaining;
    // A look may take minutes, and the others do not wait for it.
    let known = left.iter().map(Leftovers::count).sum();
    let strays = async {
        let left = look_everywhere(&store, unseen, since).await;
        looked.store(true, Relaxed);
        store.note_segments_ended();
        keep_trying(&store, left, 0, &unrepaired).await;
    };
    tokio::join!(keep_trying(&store, left, known, &unrepaired), strays);
}

/// Seals what no row speaks of, wherever the database can be asked. Returns what is left of it.
async fn look_everywhere(store: &Store, mut unseen: Vec<Shelf>, since: SystemTime) -> Vec<Leftovers> {
    let (started, mut wait) = (Instant::now(), RETRY);
    let (mut left, mut files) = (Vec::new(), 0);
    loop {
        let mut later = Vec::new();
        for shelf in unseen {
            let Err(error) = look_at(store, &shelf, since, &mut left).await.map(|found| files += found) else { continue };
            log::error!("files that the database does not know are looked for later directory={:?} error={error}", shelf.root.path());
            later.push(shelf);
        }
        if later.is_empty() {
            log::info!("looked for files that the database does not know found={files} took_ms={}", started.elapsed().as_millis());
            return left;
        }
        unseen = later;
        tokio::time::sleep(wait).await;
        wait = SLOWEST_RETRY.min(2 * wait);
    }
}

/// Seals what no row speaks of on one shelf, and returns how many files there were.
async fn look_at(store: &Store, shelf: &Shelf, since: SystemTime, left: &mut Vec<Leftovers>) -> Result<usize, DbError> {
    let files = files_without_rows(store, shelf, since).await?;
    let found = files.len();
    let still = Leftovers { shelf: shelf.clone(), rows: Vec::new(), files }.repair(store, When::Beside).await?;
    left.extend((still.count() > 0).then_some(still));
    Ok(found)
}

/// Tries again until nothing is left. `counted` of these are in `unrepaired` already.
async fn keep_trying(store: &Store, mut left: Vec<Leftovers>, mut counted: u64, unrepaired: &AtomicU64) {
    let mut wait = RETRY;
    loop {
        let count: u64 = left.iter().map(Leftovers::count).sum();
        // One step, so that nobody sees a number that never was. It wraps, as the difference does.
        unrepaired.fetch_add(count.wrapping_sub(counted), Relaxed);
        counted = count;
        if left.is_empty() {
            return;
        }
        tokio::time::sleep(wait).await;
        wait = SLOWEST_RETRY.min(2 * wait);
        for leftovers in &mut left {
            match leftovers.clone().repair(store, When::Again).await {
                Ok(still) => *leftovers = still,
                // A file that is sealed by now is found so, and its row ends then.
                Err(error) => log::error!("the rows of an earlier run end later error={error}"),
            }
        }
        left.retain(|left| left.count() > 0);
    }
}

async fn close_recordings(store: &Store, recordings: impl IntoIterator<Item = String>) -> Result<(), DbError> {
    let recordings: Vec<RecordingId> = recordings.into_iter().map(RecordingId::new).collect();
    for recordings in recordings.chunks(ROWS_AT_ONCE) {
        store.close_crashed_recordings(recordings.to_vec()).await?;
    }
    Ok(())
}

impl Leftovers {
    fn count(&self) -> u64 {
        u64::try_from(self.rows.len() + self.files.len()).unwrap_or(u64::MAX)
    }

    /// Returns what is still left.
    async fn repair(mut self, store: &Store, when: When) -> Result<Self, DbError> {
        let started = Instant::now();
        if self.count() == 0 {
            return Ok(self);
        }
        let rows_files = self.rows.iter().map(|row| interrupted(row, self.shelf.root.path()));
        let files: Vec<Interrupted> = rows_files.chain(self.files.iter().cloned().map(Interrupted::file)).collect();
        let (files, outcomes) = tokio::task::spawn_blocking(move || {
            let outcomes = match when {
                When::AtStart => repair_all(&files, Mode::Repair, || {}),
                When::Beside | When::Again => repair_each(&files),
            };
            (files, outcomes)
        })
        .await?;
        let mut outcomes = outcomes.into_iter().zip(files);
        let (mut ended, mut recordings) = (Vec::new(), HashSet::new());
        let rows = std::mem::take(&mut self.rows);
        for (row, (outcome, file)) in rows.into_iter().zip(outcomes.by_ref()) {
            match closed(&row, outcome, &file.path, when.level()) {
                Some(closed) => {
                    ended.push(closed);
                    recordings.insert(row.segment.recording_id);
                }
                None => self.rows.push(row),
            }
        }
        self.files = outcomes.filter_map(|(outcome, file)| is_left(outcome, &file.path, when.level()).then_some(file.path)).collect();
        for rows in ended.chunks(ROWS_AT_ONCE) {
            store.close_segments(rows.to_vec()).await?;
        }
        if when != When::AtStart {
            close_recordings(store, recordings).await?;
        }
        if !ended.is_empty() {
            log::warn!("closed the segments that an earlier run left open segments={} took_ms={}", ended.len(), started.elapsed().as_millis());
        }
        Ok(self)
    }
}

/// A path that leaves the directory, by itself or by a link, is none: there is no such file. Where the disk does not tell, it does not let it be repaired either.
fn path_of(directory: &Path, relative: &str) -> PathBuf {
    match straight_below(directory, relative) {
        Ok(path) => path,
        Err(error) if error.kind() == ErrorKind::NotFound => PathBuf::new(),
        Err(_) => below(directory, relative).unwrap_or_default(),
    }
}

fn interrupted(row: &SegmentInContext, directory: &Path) -> Interrupted {
    let segment = &row.segment;
    Interrupted {
        path: path_of(directory, &segment.path),
        segment_id: Some(SegmentId::new(segment.id.clone())),
        meeting_id: Some(row.meeting_id.clone()),
        room_name: Some(row.room_name.clone()),
        participant: row.participant.clone(),
        track_sid: segment.track_sid.clone(),
        format: format_of(row),
        started_at: Some(segment.started_at.and_utc()),
        session_started_at: row.session_started_at.map(|time| time.and_utc()),
        end_reason: None,
    }
}

fn format_of(row: &SegmentInContext) -> Option<PcmFormat> {
    let format = PcmFormat { sample_rate: u32::try_from(row.segment.sample_rate).ok()?, channels: u16::try_from(row.segment.channels).ok()? };
    (format.sample_rate > 0 && format.channels > 0).then_some(format)
}

/// How a row ends. `None` for one whose file another process writes, or cannot be repaired now: it stays open.
fn closed(row: &SegmentInContext, outcome: std::io::Result<Outcome>, path: &Path, level: log::Level) -> Option<ClosedSegment> {
    let id = SegmentId::new(row.segment.id.clone());
    match outcome {
        Ok(Outcome::Recovered(sidecar) | Outcome::Sealed(sidecar)) => return Some(closed_by(id, &sidecar)),
        Ok(Outcome::InUse) => {
            log::log!(level, "a segment of an earlier run is being written by another process, and is left open segment_id={id} path={path:?}");
            return None;
        }
        Ok(Outcome::Bad(aside)) => log::error!("a segment of an earlier run held nothing segment_id={id} kept_as={aside:?}"),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::InvalidData) => {
            log::error!("a segment of an earlier run has no file that could be repaired segment_id={id} path={path:?} error={error}");
        }
        Err(error) => {
            log::log!(level, "a segment of an earlier run cannot be repaired now, and is left open segment_id={id} path={path:?} error={error}");
            return None;
        }
    }
    let seal = Seal { recovered: true, ..Seal::default() };
    let is_video = Container::of(&row.segment.path).is_video();
    let format = format_of(row).unwrap_or(if is_video { PcmFormat::NONE } else { PcmFormat::LIVEKIT });
    let ended_at = modified(path).unwrap_or(row.segment.started_at.and_utc());
    Some(ClosedSegment { id, format, frames: 0, bytes: 0, ended_at, reason: EndReason::Crashed, gaps: Vec::new(), seal })
}

fn modified(path: &Path) -> Option<DateTime<Utc>> {
    std::fs::metadata(path).and_then(|metadata| metadata.modified()).ok().map(DateTime::from)
}

/// Files without a sidecar that no row speaks of. Those that have rows are repaired by these, or finished, if without a sidecar.
async fn files_without_rows(store: &Store, shelf: &Shelf, since: SystemTime) -> Result<Vec<PathBuf>, DbError> {
    let directory = shelf.root.path().to_owned();
    let mut unsealed = tokio::task::spawn_blocking(move || named(look(&directory))).await?;
    unsealed.retain(|path| shelf.holds(path));
    let relative = |path: &Path| path.strip_prefix(shelf.root.path()).unwrap_or(path).to_string_lossy().into_owned();
    let mut known = HashSet::new();
    for paths in unsealed.chunks(ROWS_AT_ONCE) {
        known.extend(store.paths_with_rows(shelf.format, paths.iter().map(|path| relative(path)).collect()).await?);
    }
    unsealed.retain(|path| !known.contains(&relative(path)));
    // Rows follow their files, so one that has just been begun may have none yet.
    let root = shelf.root.clone();
    let others = move || unsealed.into_iter().filter(|path| !(is_younger(path, since) && is_being_written(&root, path))).collect();
    Ok(tokio::task::spawn_blocking(others).await?)
}

/// Whether a file was made since then. Not every file system knows when that was.
fn is_younger(path: &Path, since: SystemTime) -> bool {
    let made = std::fs::metadata(path).and_then(|metadata| metadata.created().or_else(|_| metadata.modified()));
    made.is_ok_and(|made| made >= since)
}

/// Whether its writer holds it.
fn is_being_written(root: &Root, path: &Path) -> bool {
    let opened = root.open_file(path.strip_prefix(root.path()).unwrap_or(path));
    opened.and_then(|file| lock::hold(&file)).is_ok_and(|is_free| !is_free)
}

/// Whether who opens a file hears that another has locked it. Where that cannot be found out, nobody is to rely on it.
fn knows_locks(root: &Root) -> bool {
    let name = PathBuf::from(format!(".lock-{}", new_row_id()));
    let refused = root.create_new(&name).and_then(|held| {
        let refused = lock::hold(&held).and_then(|_| root.open_file(&name)).and_then(|other| lock::hold(&other)).map(|is_free| !is_free);
        std::fs::remove_file(root.path().join(&name))?;
        refused
    });
    refused.unwrap_or_else(|error| {
        log::warn!("whether the file system knows locks cannot be found out directory={:?} error={error}", root.path());
        false
    })
}

/// The files to look after, with those that had no name yet.
fn named(found: Found) -> Vec<PathBuf> {
    for (directory, error) in &found.unread {
        log::error!("a directory of recordings cannot be read path={directory:?} error={error}");
    }
    let mut files = found.unsealed;
    for unfinished in found.unfinished {
        match adopt(&unfinished, Mode::Repair) {
            Ok(Adopted::Named(named)) => files.push(named),
            Ok(Adopted::Left) => log::warn!("a segment that was just being made is left as it is path={unfinished:?}"),
            // Its writer has given it its name since then.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => log::error!("a segment that was just being made cannot be kept path={unfinished:?} error={error}"),
        }
    }
    files
}

/// Tells what became of a file that the database does not know. Returns whether it is to be tried again.
fn is_left(outcome: std::io::Result<Outcome>, path: &Path, level: log::Level) -> bool {
    match outcome {
        Ok(Outcome::Recovered(sidecar)) => {
            log::warn!("repaired a file that the database does not know path={path:?} frames={}", sidecar.frames);
        }
        Ok(Outcome::Bad(aside)) => log::warn!("a file that the database does not know held nothing kept_as={aside:?}"),
        // Its own start, or a repair by hand, was quicker.
        Ok(Outcome::Sealed(_)) => {}
        Ok(Outcome::InUse) => {
            log::log!(level, "a file is being written by another process path={path:?}");
            return true;
        }
        Err(error) => {
            log::log!(level, "a file that the database does not know cannot be repaired path={path:?} error={error}");
            return !matches!(error.kind(), ErrorKind::NotFound | ErrorKind::InvalidData);
        }
    }
    false
}

#[cfg(test)]
mod tests;
