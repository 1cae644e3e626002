//! Reads segments: what a growing file declares by now, and the bytes of a joined recording, never more than a chunk at a time.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use bytes::Bytes;

use super::joined::{Joined, Source};
use super::root::Root;
use super::wav_header::{self, HEADER_BYTES};
use crate::audio::format::PcmFormat;

/// The most that [`JoinedReader::next_chunk`] holds in memory.
pub const CHUNK_BYTES: usize = 64 * 1024;

/// What a chunk of a gap is cut from.
static SILENCE: [u8; CHUNK_BYTES] = [0; CHUNK_BYTES];

/// The format and the frames that a file declares, which it surely holds: the header is written last.
///
/// # Errors
/// What the file system says, or [`io::ErrorKind::InvalidData`] for a file that this program did not write.
pub fn declared(root: &Root, path: &Path) -> io::Result<(PcmFormat, u64)> {
    let file = root.open_file(path)?;
    let mut header = [0; 44];
    // A header that is being written in this moment may be read half new.
    for _ in 0..3 {
        file.read_exact_at(&mut header, 0)?;
        if let Some((format, bytes)) = wav_header::declared(&header) {
            return Ok((format, format.frames(bytes)));
        }
    }
    Err(io::Error::new(io::ErrorKind::InvalidData, "the header is not one of ours"))
}

/// Reads a range of a joined recording from its files, of which one is open at a time.
#[derive(Debug)]
pub struct JoinedReader {
    joined: Joined,
    root: Root,
    /// Those of the segments beneath the root, in the same order.
    files: Vec<PathBuf>,
    open: Option<(usize, File)>,
    rest: Range<u64>,
}

impl JoinedReader {
    pub fn new(joined: Joined, root: Root, files: Vec<PathBuf>, range: Range<u64>) -> Self {
        Self { joined, root, files, open: None, rest: range }
    }

    /// The next bytes, none at the end of the range.
    ///
    /// # Errors
    /// What the file system says, with the file's name; [`io::ErrorKind::UnexpectedEof`] for a file that is shorter than its segment.
    pub fn next_chunk(&mut self) -> io::Result<Option<Bytes>> {
        let chunk_bytes = u64::try_from(CHUNK_BYTES).unwrap_or(u64::MAX);
        let end = self.rest.end.min(self.rest.start.saturating_add(chunk_bytes));
        let Some(source) = self.joined.source(self.rest.start..end) else { return Ok(None) };
        self.rest.start += source.bytes();
        let in_memory = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX).min(CHUNK_BYTES);
        match source {
            Source::Header(header) => Ok(Some(header)),
            Source::Silence { bytes } => Ok(Some(Bytes::from_static(&SILENCE).slice(..in_memory(bytes)))),
            Source::Segment { index, offset, bytes } => {
                let mut pcm = vec![0; in_memory(bytes)];
                self.read(index, &mut pcm, offset)?;
                Ok(Some(pcm.into()))
            }
        }
    }

    fn read(&mut self, index: usize, pcm: &mut [u8], offset: u64) -> io::Result<()> {
        let path = self.files.get(index).ok_or(io::ErrorKind::NotFound)?;
        let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
        let file = match self.open.take() {
            Some((open, file)) if open == index => file,
            Some(_) | None => self.root.open_file(path).map_err(named)?,
        };
        file.read_exact_at(pcm, HEADER_BYTES + offset).map_err(named)?;
        self.open = Some((index, file));
        Ok(())
    }
}

/// Reads a range of one file as it is.
#[derive(Debug)]
pub struct FileReader {
    root: Root,
    path: PathBuf,
    open: Option<File>,
    rest: Range<u64>,
}

impl FileReader {
    pub fn new(root: Root, path: PathBuf, range: Range<u64>) -> Self {
        Self { root, path, open: None, rest: range }
    }

    /// The next bytes, none at the end of the range.
    ///
    /// # Errors
    /// What the file system says, with the file's name; [`io::ErrorKind::UnexpectedEof`] for a file that is shorter.
    pub fn next_chunk(&mut self) -> io::Result<Option<Bytes>> {
        let length = usize::try_from(self.rest.end.saturating_sub(self.rest.start)).unwrap_or(usize::MAX).min(CHUNK_BYTES);
        if length == 0 {
            return Ok(None);
        }
        let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", self.path.display()));
        let file = match self.open.take() {
            Some(file) => file,
            None => self.root.open_file(&self.path).map_err(named)?,
        };
        let mut chunk = vec![0; length];
        file.read_exact_at(&mut chunk, self.rest.start).map_err(named)?;
        self.open = Some(file);
        self.rest.start += u64::try_from(length).unwrap_or(u64::MAX);
        Ok(Some(chunk.into()))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::recording::joined::{Taken, timeline};

    /// Files of such frames of noise, a second apart from start to start, and what they are joined.
    fn segments(dir: &Path, frames: &[usize]) -> (Joined, Vec<PathBuf>, Vec<u8>) {
        let format = PcmFormat::LIVEKIT;
        let (mut taken, mut files, mut whole) = (Vec::new(), Vec::new(), Vec::new());
        for (index, &frames) in frames.iter().enumerate() {
            let pcm: Vec<u8> = (0..frames * 4).map(|at| (at * 31 + index) as u8 | 1).collect();
            let path = dir.join(format!("{index}.wav"));
            std::fs::write(&path, [&wav_header::encode(format, pcm.len() as u64)[..], &pcm].concat()).expect("written");
            taken.push(Taken { format, frames: frames as u64, after: Duration::from_secs(index as u64), goes_on: false });
            files.push(PathBuf::from(format!("{index}.wav")));
            whole.resize(index * 192_000, 0);
            whole.extend(pcm);
        }
        (Joined::new(format, timeline(&taken)), files, whole)
    }

    fn root(dir: &Path) -> Root {
        Root::open(dir).expect("a root")
    }

    fn read(mut reader: JoinedReader) -> (Vec<u8>, Option<io::ErrorKind>) {
        let mut bytes = Vec::new();
        loop {
            match reader.next_chunk() {
                Ok(Some(chunk)) => {
                    assert!((1..=CHUNK_BYTES).contains(&chunk.len()));
                    bytes.extend(chunk);
                }
                Ok(None) => return (bytes, None),
                Err(error) => return (bytes, Some(error.kind())),
            }
        }
    }

    #[test]
    fn files_are_read_one_behind_the_other_with_silence_between_them() {
        let dir = tempfile::tempdir().expect("a directory");
        let (joined, files, pcm) = segments(dir.path(), &[48_000, 30_000, 24_000]);
        let whole = [&wav_header::encode(PcmFormat::LIVEKIT, pcm.len() as u64)[..], &pcm].concat();
        for range in [0..whole.len(), 10..50, 192_000..192_100, 300_000..400_000, 400_000..whole.len()] {
            let (bytes, error) = read(JoinedReader::new(joined.clone(), root(dir.path()), files.clone(), range.start as u64..range.end as u64));
            assert!(bytes == whole[range.clone()] && error.is_none(), "{range:?}: {} bytes, {error:?}", bytes.len());
        }
    }

    #[test]
    fn a_file_that_is_too_short_or_gone_ends_the_reading_and_nothing_is_made_up() {
        let dir = tempfile::tempdir().expect("a directory");
        let (joined, files, pcm) = segments(dir.path(), &[48_000, 48_000]);
        let whole = [&wav_header::encode(PcmFormat::LIVEKIT, pcm.len() as u64)[..], &pcm].concat();
        let shortened = File::options().write(true).open(dir.path().join(&files[1])).expect("a file");
        shortened.set_len(44 + 100_000).expect("cut");
        let all = || JoinedReader::new(joined.clone(), root(dir.path()), files.clone(), 0..joined.total_bytes());
        let (bytes, error) = read(all());
        assert_eq!(error, Some(io::ErrorKind::UnexpectedEof));
        assert!(whole.starts_with(&bytes) && (192_044..=292_044).contains(&bytes.len()), "{}", bytes.len());
        std::fs::remove_file(dir.path().join(&files[1])).expect("removed");
        let (bytes, error) = read(all());
        assert_eq!(error, Some(io::ErrorKind::NotFound));
        assert!(bytes == whole[..192_044], "{}", bytes.len());
    }

    #[test]
    fn a_growing_file_holds_what_its_header_says() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("x.wav");
        let mut file = wav_header::encode(PcmFormat::LIVEKIT, 8).to_vec();
        file.extend([7; 4 * 10 + 3]);
        std::fs::write(&path, &file).expect("written");
        let declared = || declared(&root(dir.path()), Path::new("x.wav"));
        assert_eq!(declared().expect("a header"), (PcmFormat::LIVEKIT, 2));
        file[20] = 3;
        std::fs::write(&path, &file).expect("written");
        assert_eq!(declared().map_err(|error| error.kind()), Err(io::ErrorKind::InvalidData));
    }
}
