//! The files of the journal: records are appended to the last and read from the first, and a durable cursor says how far they have been dealt with.
//!
//! Each run begins a file of its own, and goes on to the next past 16 MiB, so that what has been dealt with can be removed. A record counts as written when
//! `fdatasync` has returned; a failed one is never believed later: its file is cut and not written any more.

use std::collections::VecDeque;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::format::{self, Next};
use crate::recording::lock;

/// A longer file is followed by the next.
const FILE_BYTES: u64 = 16 << 20;
/// What one read takes from a file, unless a record is longer.
const READ_BYTES: usize = 256 << 10;
const CURSOR: &str = "cursor";
const SUFFIX: &str = "journal";
/// Of parts that cannot be used.
const BAD: &str = "bad";
/// Held by the server that uses the directory.
const LOCK: &str = "lock";

/// A place between two records.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position {
    pub file: u64,
    pub offset: u64,
}

/// A record that waits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub at_ms: i64,
    pub payload: Vec<u8>,
    pub from: Position,
    pub to: Position,
}

/// What waits in a directory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Waiting {
    pub records: u64,
    pub bytes: u64,
    /// Milliseconds since 1970, of the first.
    pub oldest_ms: Option<i64>,
    /// Stretches that are no record.
    pub corrupt: u64,
    /// Files of parts that could not be used.
    pub set_aside: u64,
}

/// The journal's directory. One thread owns it.
#[derive(Debug)]
pub struct Files {
    dir: PathBuf,
    /// In their order; the last is the one that is written, if [`Self::tail`] is open.
    lengths: VecDeque<(u64, u64)>,
    tail: Option<File>,
    cursor: Position,
    cursor_is_stale: bool,
    next_number: u64,
    /// As long as it is open, no other server gets in.
    _lock: File,
}

impl Files {
    /// Makes the directory if need be, cuts a torn tail off, and sets aside what is corrupt.
    ///
    /// # Errors
    /// What the file system says; [`io::ErrorKind::WouldBlock`] where another server uses the directory.
    pub fn open(dir: &Path) -> io::Result<(Self, Waiting)> {
        DirBuilder::new().mode(0o750).recursive(true).create(dir)?;
        let lock = hold(dir)?;
        let lengths: VecDeque<(u64, u64)> = list(dir)?.into();
        let cursor = read_cursor(dir)?;
        let last = lengths.back().map_or(0, |(number, _)| *number);
        let next_number = last.max(cursor.file) + 1;
        let mut files = Self { dir: dir.to_owned(), lengths, tail: None, cursor, cursor_is_stale: false, next_number, _lock: lock };
        let mut waiting = Waiting::default();
        for (number, length) in files.lengths.iter_mut() {
            let bytes = std::fs::read(path(dir, *number))?;
            for part in parts(&bytes, start_in(*number, cursor)) {
                match part {
                    Part::Record(at_ms) => waiting.add(at_ms),
                    Part::Torn(offset) => {
                        log::warn!(
                            "the last record of a file of the journal was not written whole: it is cut off, nobody was told of it file={number}"
                        );
                        let file = OpenOptions::new().write(true).open(path(dir, *number))?;
                        file.set_len(offset)?;
                        file.sync_data()?;
                        *length = offset;
                    }
                    Part::Corrupt(offset, content) => {
                        waiting.corrupt += 1;
                        set_aside(dir, Position { file: *number, offset }, content, "it is corrupt");
                    }
                }
            }
        }
        waiting.bytes = files.bytes();
        waiting.set_aside = set_aside_in(dir)?;
        Ok((files, waiting))
    }

    /// Writes whole records behind all others, and returns when they are on the disk. All or nothing.
    ///
    /// # Errors
    /// What the file system says; none of the records is kept then.
    pub fn append(&mut self, records: &[u8]) -> io::Result<()> {
        let full = self.lengths.back().is_some_and(|(_, length)| *length >= FILE_BYTES);
        let file = match self.tail.take().filter(|_| !full) {
            Some(file) => file,
            None => self.begin_file()?,
        };
        let Some((_, length)) = self.lengths.back_mut() else { return Err(io::ErrorKind::NotFound.into()) };
        if let Err(error) = file.write_all_at(records, *length) {
            // As if nothing had been written, most likely for want of space.
            if file.set_len(*length).is_ok() {
                self.tail = Some(file);
            }
            return Err(error);
        }
        if let Err(error) = file.sync_data() {
            // What a failed sync left behind is cut off, and the next append begins another file.
            if let Err(error) = file.set_len(*length).and_then(|()| file.sync_data()) {
                log::error!("what could not be written to the journal cannot be cut off either error={error}");
            }
            return Err(error);
        }
        *length += u64::try_from(records.len()).unwrap_or(u64::MAX);
        self.tail = Some(file);
        Ok(())
    }

    fn begin_file(&mut self) -> io::Result<File> {
        let number = self.next_number;
        let file = OpenOptions::new().write(true).create_new(true).mode(0o640).open(path(&self.dir, number))?;
        // Its name is taken whatever comes: an empty file that stays behind is no part of the journal.
        self.next_number += 1;
        File::open(&self.dir)?.sync_all()?;
        self.lengths.push_back((number, 0));
        Ok(file)
    }

    pub fn bytes(&self) -> u64 {
        self.lengths.iter().map(|(_, length)| *length).sum()
    }

    /// Where the first record that has not been dealt with begins.
    pub fn front(&self) -> Position {
        self.cursor
    }

    /// The records from a place on: some of them, none only at the end.
    ///
    /// # Errors
    /// What the file system says.
    pub fn read(&self, from: Position) -> io::Result<Vec<Entry>> {
        for (number, length) in &self.lengths {
            let start = start_in(*number, from);
            if *number < from.file || start >= *length {
                continue;
            }
            let entries = self.read_file(*number, start, *length)?;
            if !entries.is_empty() {
                return Ok(entries);
            }
        }
        Ok(Vec::new())
    }

    fn read_file(&self, number: u64, start: u64, length: u64) -> io::Result<Vec<Entry>> {
        let file = File::open(path(&self.dir, number))?;
        let rest = usize::try_from(length.saturating_sub(start)).unwrap_or(usize::MAX);
        let mut bytes = vec![0; rest.min(READ_BYTES)];
        file.read_exact_at(&mut bytes, start)?;
        let mut entries = Vec::new();
        let mut offset = 0;
        while let Some(found) = bytes.get(offset..).and_then(format::record) {
            entries.push(entry(number, start, offset, found));
            offset += found.length;
        }
        if !entries.is_empty() {
            return Ok(entries);
        }
        // A long record, or none: the rest of the file tells.
        let mut bytes = vec![0; rest];
        file.read_exact_at(&mut bytes, start)?;
        let mut offset = 0;
        while let Some(left) = bytes.get(offset..) {
            match format::next(left) {
                Next::Record(found) => {
                    entries.push(entry(number, start, offset, found));
                    break;
                }
                Next::Corrupt(length) => {
                    set_aside(
                        &self.dir,
                        Position { file: number, offset: start + wide(offset) },
                        left.get(..length).unwrap_or(left),
                        "it is corrupt",
                    );
                    offset += length;
                }
                Next::Torn | Next::End => break,
            }
        }
        Ok(entries)
    }

    /// Remembers that everything in front of `to` has been dealt with, and removes the files of which nothing is left. A disk that is full does not keep the
    /// journal from getting empty: without the cursor, some is dealt with twice after a kill, which does no harm.
    ///
    /// # Errors
    /// What the file system says of what is removed.
    pub fn advance(&mut self, to: Position) -> io::Result<()> {
        let written = write_cursor(&self.dir, to);
        if let Err(error) = &written
            && !self.cursor_is_stale
        {
            log::warn!("how far the journal has been dealt with cannot be written down error={error}");
        }
        self.cursor_is_stale = written.is_err();
        self.cursor = to;
        while let Some((number, _)) = self.lengths.front().filter(|(number, _)| *number < to.file) {
            std::fs::remove_file(path(&self.dir, *number))?;
            self.lengths.pop_front();
        }
        Ok(())
    }

    /// Removes every file: all of it has been dealt with.
    ///
    /// # Errors
    /// What the file system says.
    pub fn clear(&mut self) -> io::Result<()> {
        self.tail = None;
        while let Some((number, _)) = self.lengths.front() {
            std::fs::remove_file(path(&self.dir, *number))?;
            self.lengths.pop_front();
        }
        // Without it, whatever begins next is read from its front.
        remove_if_there(&self.dir.join(CURSOR))?;
        File::open(&self.dir)?.sync_all()?;
        self.cursor = Position { file: self.next_number, offset: 0 };
        Ok(())
    }

    /// Keeps a record beside the journal that can never be dealt with.
    pub fn set_aside(&self, entry: &Entry, why: &str) {
        set_aside(&self.dir, entry.from, &entry.payload, why);
    }
}

impl Waiting {
    fn add(&mut self, at_ms: i64) {
        self.records += 1;
        self.oldest_ms = self.oldest_ms.or(Some(at_ms));
    }
}

/// What waits in a directory, which is left as it is.
///
/// # Errors
/// What the file system says. A directory that is not there holds nothing.
pub fn look(dir: &Path) -> io::Result<Waiting> {
    if !dir.exists() {
        return Ok(Waiting::default());
    }
    let (cursor, mut waiting) = (read_cursor(dir)?, Waiting { set_aside: set_aside_in(dir)?, ..Waiting::default() });
    for (number, length) in list(dir)? {
        waiting.bytes += length;
        let bytes = std::fs::read(path(dir, number))?;
        for part in parts(&bytes, start_in(number, cursor)) {
            match part {
                Part::Record(at_ms) => waiting.add(at_ms),
                Part::Corrupt(..) => waiting.corrupt += 1,
                Part::Torn(_) => {}
            }
        }
    }
    Ok(waiting)
}

/// The number of files of parts that could not be used.
///
/// # Errors
/// What the file system says.
pub fn set_aside_in(dir: &Path) -> io::Result<u64> {
    let mut count = 0;
    for entry in std::fs::read_dir(dir)? {
        count += u64::from(entry?.path().extension().is_some_and(|suffix| suffix == BAD));
    }
    Ok(count)
}

/// Two servers in one directory would cut, apply and remove each other's files.
fn hold(dir: &Path) -> io::Result<File> {
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o640).open(dir.join(LOCK))?;
    let taken = || io::Error::new(io::ErrorKind::WouldBlock, "another server is using it");
    if lock::hold(&file)? { Ok(file) } else { Err(taken()) }
}

/// A part of a file: a record by its time, or what is none, by its offset.
enum Part<'a> {
    Record(i64),
    Torn(u64),
    Corrupt(u64, &'a [u8]),
}

fn parts(bytes: &[u8], start: u64) -> Vec<Part<'_>> {
    let mut offset = usize::try_from(start).unwrap_or(usize::MAX);
    let mut parts = Vec::new();
    while let Some(left) = bytes.get(offset..) {
        match format::next(left) {
            Next::Record(found) => {
                parts.push(Part::Record(found.at_ms));
                offset += found.length;
            }
            Next::Corrupt(length) => {
                parts.push(Part::Corrupt(wide(offset), left.get(..length).unwrap_or(left)));
                offset += length;
            }
            Next::Torn => {
                parts.push(Part::Torn(wide(offset)));
                break;
            }
            Next::End => break,
        }
    }
    parts
}

fn entry(number: u64, start: u64, offset: usize, found: format::Found<'_>) -> Entry {
    let from = start + wide(offset);
    let to = from + wide(found.length);
    let place = |offset| Position { file: number, offset };
    Entry { at_ms: found.at_ms, payload: found.payload.to_vec(), from: place(from), to: place(to) }
}

/// Where in a file the records behind a place begin; past every length in files before it.
fn start_in(number: u64, from: Position) -> u64 {
    match number.cmp(&from.file) {
        std::cmp::Ordering::Less => u64::MAX,
        std::cmp::Ordering::Equal => from.offset,
        std::cmp::Ordering::Greater => 0,
    }
}

fn wide(length: usize) -> u64 {
    u64::try_from(length).unwrap_or(u64::MAX)
}

fn path(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("{number:020}.{SUFFIX}"))
}

/// The files with their lengths, in their order.
fn list(dir: &Path) -> io::Result<Vec<(u64, u64)>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let path = entry.path();
        let number = path.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| stem.parse::<u64>().ok());
        if let Some(number) = number.filter(|_| path.extension().is_some_and(|suffix| suffix == SUFFIX)) {
            files.push((number, entry.metadata()?.len()));
        }
    }
    files.sort_unstable();
    Ok(files)
}

/// The front, if there is no cursor or it was torn: what is dealt with twice does no harm.
fn read_cursor(dir: &Path) -> io::Result<Position> {
    let bytes = match std::fs::read(dir.join(CURSOR)) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Position::default()),
        Err(error) => return Err(error),
    };
    let position = bytes.split_first_chunk::<8>().and_then(|(file, rest)| {
        let (offset, sum) = rest.split_first_chunk::<8>()?;
        let position = Position { file: u64::from_le_bytes(*file), offset: u64::from_le_bytes(*offset) };
        (cursor_bytes(position).get(16..)? == sum).then_some(position)
    });
    if position.is_none() {
        log::warn!("the cursor of the journal is torn: it is read from its front again");
    }
    Ok(position.unwrap_or_default())
}

fn cursor_bytes(position: Position) -> Vec<u8> {
    let mut bytes = [position.file.to_le_bytes(), position.offset.to_le_bytes()].concat();
    bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
    bytes
}

/// One write within a sector.
fn write_cursor(dir: &Path, position: Position) -> io::Result<()> {
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o640).open(dir.join(CURSOR))?;
    file.write_all_at(&cursor_bytes(position), 0)?;
    file.sync_data()
}

/// Copies what cannot be used into a file of its own, once, and says so.
fn set_aside(dir: &Path, from: Position, content: &[u8], why: &str) {
    let path = dir.join(format!("{:020}-{}.{BAD}", from.file, from.offset));
    let kept = OpenOptions::new().write(true).create_new(true).mode(0o640).open(&path).and_then(|file| {
        file.write_all_at(content, 0)?;
        file.sync_all()
    });
    match kept {
        Ok(()) => log::error!("a part of the journal is set aside: {why} path={} bytes={}", path.display(), content.len()),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => log::error!("a part of the journal is lost: {why} bytes={} error={error}", content.len()),
    }
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn record(number: u8, length: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        format::encode(i64::from(number) + 1, &vec![number; length], &mut bytes).expect("short enough");
        bytes
    }

    /// The first byte of each record that waits.
    fn numbers(files: &Files) -> Vec<u8> {
        let (mut from, mut numbers) = (files.front(), Vec::new());
        loop {
            let entries = files.read(from).expect("read");
            let Some(last) = entries.last() else { return numbers };
            from = last.to;
            numbers.extend(entries.iter().map(|entry| entry.payload[0]));
        }
    }

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> =
            std::fs::read_dir(dir).expect("listed").map(|entry| entry.expect("an entry").file_name().into_string().expect("text")).collect();
        names.retain(|name| name != LOCK);
        names.sort();
        names
    }

    #[test]
    fn w6_what_is_appended_waits_in_order_over_restarts_until_it_is_dealt_with() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("journal");
        let (mut files, waiting) = Files::open(&path).expect("opened");
        assert_eq!((waiting, look(&path).expect("looked")), (Waiting::default(), Waiting::default()));
        files.append(&[record(0, 10), record(1, 300_000)].concat()).expect("appended");
        files.append(&record(2, 10)).expect("appended");
        assert_eq!(Files::open(&path).expect_err("it is in use").kind(), io::ErrorKind::WouldBlock);
        drop(files);
        let (mut files, waiting) = Files::open(&path).expect("opened again");
        assert_eq!((waiting.records, waiting.oldest_ms, waiting.corrupt), (3, Some(1), 0));
        files.append(&record(3, 10)).expect("appended");
        assert_eq!(numbers(&files), [0, 1, 2, 3]);
        let modes: Vec<u32> = names(&path).iter().map(|name| path.join(name).metadata().expect("a file").permissions().mode() & 0o777).collect();
        assert_eq!(modes, [0o640, 0o640]);
        assert_eq!(path.metadata().expect("a directory").permissions().mode() & 0o777, 0o750);

        let first = files.read(files.front()).expect("read").remove(0);
        files.advance(first.to).expect("advanced");
        drop(files);
        let (mut files, waiting) = Files::open(&path).expect("opened again");
        assert_eq!((numbers(&files), waiting.records, look(&path).expect("looked")), (vec![1, 2, 3], 3, waiting));
        let last = files.read(Position { file: 2, offset: 0 }).expect("read").remove(0);
        files.advance(last.from).expect("advanced");
        assert_eq!((names(&path).len(), numbers(&files)), (2, vec![3]), "what is dealt with is removed");
        files.clear().expect("cleared");
        assert!(names(&path).is_empty() && numbers(&files).is_empty());
        files.append(&record(4, 10)).expect("appended");
        drop(files);
        let (files, _) = Files::open(&path).expect("opened again");
        assert_eq!(numbers(&files), [4], "nothing is skipped after a clearing");
    }

    #[test]
    fn a_file_that_is_full_is_followed_by_the_next() {
        let dir = tempfile::tempdir().expect("a directory");
        let (mut files, _) = Files::open(dir.path()).expect("opened");
        for number in 0..5 {
            files.append(&record(number, 6 << 20)).expect("appended");
        }
        assert_eq!((names(dir.path()).len(), numbers(&files)), (2, vec![0, 1, 2, 3, 4]));
    }

    #[test]
    fn a_torn_tail_is_cut_off_and_a_corrupt_record_is_set_aside_once() {
        let dir = tempfile::tempdir().expect("a directory");
        let (mut files, _) = Files::open(dir.path()).expect("opened");
        files.append(&[record(0, 10), record(1, 10), record(2, 10)].concat()).expect("appended");
        drop(files);
        let file = path(dir.path(), 1);
        let mut content = std::fs::read(&file).expect("read");
        content[40] ^= 1;
        content.extend(&record(3, 10)[..25]);
        std::fs::write(&file, &content).expect("written");
        for _ in 0..2 {
            let (files, waiting) = Files::open(dir.path()).expect("opened");
            assert_eq!((numbers(&files), waiting.records, waiting.corrupt, waiting.set_aside), (vec![0, 2], 2, 1, 1));
            assert_eq!(std::fs::metadata(&file).expect("a file").len(), 90);
        }
        let bad: Vec<String> = names(dir.path()).into_iter().filter(|name| name.ends_with(".bad")).collect();
        assert_eq!(bad, [format!("{:020}-30.bad", 1)]);
        assert_eq!(std::fs::read(dir.path().join(&bad[0])).expect("read"), content[30..60]);
    }

    #[test]
    fn a_torn_cursor_goes_back_to_the_front() {
        let dir = tempfile::tempdir().expect("a directory");
        let (mut files, _) = Files::open(dir.path()).expect("opened");
        files.append(&[record(0, 10), record(1, 10)].concat()).expect("appended");
        files.advance(Position { file: 1, offset: 30 }).expect("advanced");
        drop(files);
        assert_eq!(numbers(&Files::open(dir.path()).expect("opened").0), [1]);
        for length in [0, 7, 19] {
            std::fs::write(dir.path().join(CURSOR), vec![0; length]).expect("written");
            assert_eq!(numbers(&Files::open(dir.path()).expect("opened").0), [0, 1]);
        }
    }
    #[test]
    fn w6_a_cursor_that_cannot_be_written_does_not_keep_the_journal_from_getting_empty() {
        let dir = tempfile::tempdir().expect("a directory");
        let (mut files, _) = Files::open(dir.path()).expect("opened");
        for number in 0..4 {
            files.append(&record(number, 6 << 20)).expect("appended");
        }
        // As a full disk.
        std::fs::create_dir(dir.path().join(CURSOR)).expect("made");
        let third = files.read(Position { file: 2, offset: 0 }).expect("read").remove(0);
        files.advance(third.from).expect("advanced");
        assert_eq!((numbers(&files), names(dir.path()).len()), (vec![3], 2), "what is dealt with is removed");
        std::fs::remove_dir(dir.path().join(CURSOR)).expect("removed");
        drop(files);
        assert_eq!(numbers(&Files::open(dir.path()).expect("opened").0), [3]);
    }
}
