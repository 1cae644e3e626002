//! One WAV file that is valid at every instant.
//!
//! Data goes first, then one 44-byte write of the whole header: a reader, and a crash, may see the header lag behind the data by one append,
//! which every player takes for a slightly shorter file, but never a header that promises too much (`docs/FACTS.md`, WAV readers). What an append
//! that fails has done is taken back, so it can be made again.
//!
//! A 4 KiB block of the file that holds only zeros is never written: it reads as the silence it is, and costs no disk.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use chrono::{DateTime, Utc};

use super::append_pool::{AppendPool, Lost};
use super::fence::Fence;
use super::finish::Finished;
use super::moving::Moving;
use super::notes::Notes;
use super::path::SegmentName;
use super::root::{Directory, Root};
use super::syncer::{Syncer, Watched};
use super::unnamed::{Unnamed, file_name};
use super::wav_header::{self, HEADER_BYTES};
use crate::audio::format::PcmFormat;
use crate::audio::level::is_digital_silence;

/// The unit in which files leave out zeros; the block size of ext4, XFS and others.
const BLOCK_BYTES: u64 = 4096;

/// How long an append waits for the disk to have what it moves: as long as a power cut may take (D3).
const MOVE_IS_SYNCED: Duration = Duration::from_secs(1);

/// A stretch of a recording.
#[derive(Debug, Clone, PartialEq)]
pub enum Piece {
    Audio(Bytes),
    /// So many bytes that could not be kept: a hole, which reads as zeros.
    Lost(u64),
    /// So many bytes that the sender left out: a hole in front of the last `behind` bytes of the file.
    Missing {
        bytes: u64,
        behind: u64,
    },
    /// So many bytes of a muted track's zeros that are left out on purpose: they take no room in the file.
    Muted(u64),
}

impl Piece {
    /// The bytes that the piece takes in the file.
    pub fn file_bytes(&self) -> u64 {
        match self {
            Self::Audio(audio) => len(audio),
            Self::Lost(bytes) | Self::Missing { bytes, .. } => *bytes,
            Self::Muted(_) => 0,
        }
    }
}

/// A segment that is finished: its file changes no more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sealed {
    pub frames: u64,
    /// Bytes of PCM; the file is 44 bytes longer.
    pub bytes: u64,
}

/// An open segment.
#[derive(Debug)]
pub struct SegmentFile {
    file: Arc<File>,
    watched: Watched,
    /// The meeting's.
    directory: Directory,
    /// Relative to the audio directory.
    relative: PathBuf,
    started_at: DateTime<Utc>,
    format: PcmFormat,
    data_bytes: u64,
    /// How far the file has been written or extended.
    file_bytes: u64,
    /// An append is under way, or left something behind that could not be taken back yet.
    is_untidy: bool,
    /// What that append moves: it ends where the audio does that counts.
    moving: Option<Moving>,
    /// That is where it belongs already, by the append that comes next.
    is_prepared: bool,
    syncer: Syncer,
}

impl SegmentFile {
    /// Makes the file with its first audio. It appears under its name complete, and never in the place of another: where the name is taken,
    /// the time stamp moves on by a millisecond.
    ///
    /// # Errors
    /// Whatever the file system says; no file is left under the name then.
    pub fn create(root: &Root, name: &SegmentName, time: DateTime<Utc>, format: PcmFormat, first: &[Piece], syncer: &Syncer) -> io::Result<Self> {
        let Unnamed { file, watched, place } = Unnamed::new(root, &name.directory(), syncer)?;
        let mut segment = Self {
            file,
            watched,
            directory: place.directory.clone(),
            relative: PathBuf::new(),
            started_at: time,
            format,
            data_bytes: 0,
            file_bytes: 0,
            is_untidy: false,
            moving: None,
            is_prepared: false,
            syncer: syncer.clone(),
        };
        segment.relative = place.keep(segment.append(first), time, |time| name.file(time))?;
        syncer.sync_name(&segment.watched, segment.directory.handle());
        Ok(segment)
    }

    /// The path below the audio directory.
    pub fn relative_path(&self) -> &Path {
        &self.relative
    }

    pub fn format(&self) -> PcmFormat {
        self.format
    }

    /// When the first sample came.
    pub fn started_at(&self) -> DateTime<Utc> {
        self.started_at
    }

    /// Bytes of PCM so far.
    pub fn data_bytes(&self) -> u64 {
        self.data_bytes
    }

    /// Has what an append of these pieces moves written down, and copied to where it belongs, both on the disk: then its place may be emptied. No thread
    /// waits for the disk. Contract: comes before each append but the first.
    ///
    /// # Errors
    /// When a job was lost, and the file with it. Beside the file, whatever the file system says; then nothing has moved, or the next append takes it back.
    pub async fn prepare(self, pieces: &[Piece], pool: &AppendPool) -> Result<(Self, io::Result<()>), Lost> {
        let (behind, bytes) = self.moved_by(pieces.first());
        if behind == 0 && !self.is_untidy {
            return Ok((self, Ok(())));
        }
        let tidy = move |file: &mut Self| {
            if file.is_untidy {
                file.take_back()?;
            }
            if behind > 0 { file.note_move(behind) } else { Ok(Vec::new()) }
        };
        let (mut file, mut outcome) = self.on_disk(tidy, pool).await?;
        if behind > 0 && outcome.is_ok() {
            (file, outcome) = file.on_disk(move |file| file.copy_back(behind, bytes), pool).await?;
            file.is_prepared = outcome.is_ok();
        }
        Ok((file, outcome))
    }

    /// Does something and waits until the disk has what that tells, unless it takes too long: then it keeps no promise. Nor is anything sure of a file that is
    /// suspect.
    async fn on_disk<W>(mut self, work: W, pool: &AppendPool) -> Result<(Self, io::Result<()>), Lost>
    where
        W: FnOnce(&mut Self) -> io::Result<Vec<Arc<File>>> + Send + 'static,
    {
        let done = move || {
            let wanted = work(&mut self);
            (self, wanted)
        };
        let (file, wanted) = pool.run(done).await?;
        let outcome = match wanted {
            Ok(wanted) if !file.is_suspect() => {
                let synced = tokio::time::timeout(MOVE_IS_SYNCED, file.syncer.sync_for(&file.watched, wanted)).await;
                synced.unwrap_or(Ok(()))
            }
            wanted => wanted.map(drop),
        };
        Ok((file, outcome))
    }

    /// How many bytes of audio a piece moves, and how far. No more than there are: the rest is in an earlier segment.
    fn moved_by(&self, first: Option<&Piece>) -> (u64, u64) {
        if let Some(Piece::Missing { behind, bytes }) = first { ((*behind).min(self.data_bytes), *bytes) } else { (0, 0) }
    }

    /// Returns what must be on the disk before anything moves.
    fn note_move(&mut self, behind: u64) -> io::Result<Vec<Arc<File>>> {
        let mut audio = vec![0; usize::try_from(behind).unwrap_or(usize::MAX)];
        self.file.read_exact_at(&mut audio, HEADER_BYTES + self.data_bytes - behind)?;
        let moving = self.moving.insert(Moving::note(&self.directory, &file_name(&self.relative), self.data_bytes, audio)?);
        Ok(moving.wanted())
    }

    /// Writes the last `behind` bytes `bytes` further back. Where they began, zeros are to follow. Returns what must be on the disk before that.
    fn copy_back(&mut self, behind: u64, bytes: u64) -> io::Result<Vec<Arc<File>>> {
        self.is_untidy = true;
        let (end, audio) = (HEADER_BYTES + self.data_bytes, self.moving.as_ref().map_or(&[][..], Moving::audio));
        self.file.write_all_at(audio, end - behind + bytes)?;
        self.file_bytes = self.file_bytes.max(end + bytes);
        Ok(vec![Arc::clone(&self.file)])
    }

    /// Appends whole pieces and then declares them in the header. After an error nothing of them counts or is in the way.
    ///
    /// # Errors
    /// Whatever the file system says.
    pub fn append(&mut self, pieces: &[Piece]) -> io::Result<()> {
        let end = self.write_or_take_back(pieces)?;
        self.count(end);
        Ok(())
    }

    /// The same, of an append that has begun. Returns whether it counts; what was given up meanwhile is taken back, for it is in another file by then.
    ///
    /// # Errors
    /// Whatever the file system says.
    pub fn append_within(&mut self, fence: &Fence, pieces: &[Piece]) -> io::Result<bool> {
        let end = self.write_or_take_back(pieces)?;
        if fence.finish() {
            self.count(end);
            return Ok(true);
        }
        self.take_back()?;
        Ok(false)
    }

    fn count(&mut self, end: u64) {
        self.data_bytes = end;
        self.is_untidy = false;
        self.moving = None;
        self.watched.note_written();
    }

    /// Makes the file what it was before the append under way. A disk that fails may not let it: then the next append does it, or the file's end.
    fn take_back(&mut self) -> io::Result<()> {
        let end = HEADER_BYTES + self.data_bytes;
        self.file.write_all_at(&wav_header::encode(self.format, self.data_bytes), 0)?;
        // Before anything is written, which a full disk has room for then.
        self.file.set_len(end)?;
        if let Some(moving) = &self.moving {
            moving.put_back(&self.file)?;
        }
        self.file_bytes = end;
        self.is_untidy = false;
        self.is_prepared = false;
        self.moving = None;
        self.watched.note_written();
        Ok(())
    }

    fn write_or_take_back(&mut self, pieces: &[Piece]) -> io::Result<u64> {
        if self.is_untidy && !std::mem::take(&mut self.is_prepared) {
            self.take_back()?;
        }
        self.is_untidy = true;
        let written = self.write(pieces);
        if written.is_err()
            && let Err(error) = self.take_back()
        {
            log::debug!("what an append left behind waits for its end path={:?} error={error}", self.relative);
        }
        written
    }

    /// Returns where the audio ends then.
    fn write(&mut self, pieces: &[Piece]) -> io::Result<u64> {
        let (mut end, mut hole) = (self.data_bytes, None);
        for piece in pieces {
            match piece {
                Piece::Audio(audio) => self.write_sparse(HEADER_BYTES + end, audio)?,
                Piece::Missing { .. } => {
                    // Only the first piece of an append moves anything. At the end the hole is made by extending the file.
                    let (behind, bytes) = self.moved_by(Some(piece));
                    if behind > 0 {
                        if self.moving.is_none() {
                            self.note_move(behind)?;
                            self.copy_back(behind, bytes)?;
                        }
                        hole = Some((HEADER_BYTES + end - behind, bytes));
                    }
                }
                Piece::Lost(_) | Piece::Muted(_) => {}
            }
            end += piece.file_bytes();
        }
        if self.file_bytes < HEADER_BYTES + end {
            self.file.set_len(HEADER_BYTES + end)?;
            self.file_bytes = HEADER_BYTES + end;
        }
        // Last of the audio, for what is emptied here is room that a full disk need not give back.
        if let Some((start, bytes)) = hole {
            fill_with_zeros(&self.file, start, bytes)?;
        }
        self.file.write_all_at(&wav_header::encode(self.format, end), 0)?;
        Ok(end)
    }

    /// What it does not show, to be told beside it.
    pub fn notes(&self, syncer: &Syncer) -> Notes {
        Notes::new(syncer.clone(), self.directory.clone(), file_name(&self.relative))
    }

    /// Whether the disk has said that it lost something of the file.
    pub fn is_suspect(&self) -> bool {
        self.watched.has_failed()
    }

    /// Corrects the declared format. The audio stays as it is.
    ///
    /// # Errors
    /// Whatever the file system says.
    pub fn set_format(&mut self, format: PcmFormat) -> io::Result<()> {
        self.file.write_all_at(&wav_header::encode(format, self.data_bytes), 0)?;
        self.format = format;
        Ok(())
    }

    /// Removes the file: nothing in it counts.
    ///
    /// # Errors
    /// Whatever the file system says.
    pub fn discard(self) -> io::Result<()> {
        self.directory.remove(&file_name(&self.relative))
    }

    /// Finishes the file: cut to what the header declares, and still to be handed to the disk.
    ///
    /// # Errors
    /// Whatever the file system says; the file is valid all the same.
    pub fn cut(mut self) -> io::Result<(Sealed, Finished)> {
        let frames = self.format.frames(self.data_bytes);
        let bytes = frames * self.format.frame_bytes();
        if self.is_untidy {
            self.take_back()?;
        }
        if self.file.metadata()?.len() != HEADER_BYTES + bytes {
            self.file.set_len(HEADER_BYTES + bytes)?;
        }
        let name = file_name(&self.relative);
        Ok((Sealed { frames, bytes }, Finished { file: self.file, watched: self.watched, directory: self.directory, name }))
    }

    /// Writes `audio` at `offset`, leaving out what is zero within a block of the file.
    fn write_sparse(&mut self, offset: u64, audio: &[u8]) -> io::Result<()> {
        let mut run_start = offset;
        let mut run: &[u8] = &[];
        let mut rest = audio;
        let mut position = offset;
        while !rest.is_empty() {
            let in_block = usize::try_from(BLOCK_BYTES - position % BLOCK_BYTES).unwrap_or(usize::MAX).min(rest.len());
            let (block, tail) = rest.split_at(in_block);
            if is_digital_silence(block) {
                self.write_run(run_start, run)?;
                run = &[];
                run_start = position + len(block);
            } else {
                let from = usize::try_from(run_start - offset).unwrap_or(usize::MAX);
                let to = usize::try_from(position - offset).unwrap_or(usize::MAX).saturating_add(in_block);
                run = audio.get(from..to).unwrap_or_default();
            }
            position += len(block);
            rest = tail;
        }
        self.write_run(run_start, run)
    }

    fn write_run(&mut self, offset: u64, run: &[u8]) -> io::Result<()> {
        if run.is_empty() {
            return Ok(());
        }
        self.file.write_all_at(run, offset)?;
        self.file_bytes = self.file_bytes.max(offset + len(run));
        Ok(())
    }
}

/// Makes a stretch of a file read as zeros, without disk where the file system can.
fn fill_with_zeros(file: &File, start: u64, bytes: u64) -> io::Result<()> {
    use rustix::fs::{FallocateFlags, fallocate};
    use rustix::io::Errno;
    match fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, start, bytes) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
            let zeros = vec![0; usize::try_from(BLOCK_BYTES).unwrap_or(4096)];
            let mut rest = bytes;
            while rest > 0 {
                let part = zeros.get(..usize::try_from(rest).unwrap_or(usize::MAX)).unwrap_or(&zeros);
                file.write_all_at(part, start + bytes - rest)?;
                rest -= len(part);
            }
            Ok(())
        }
        outcome => Ok(outcome?),
    }
}

fn len(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn name() -> SegmentName {
        SegmentName { meeting: "RM_1".into(), room: "room".into(), participant: None, track: Some("TR_1".into()) }
    }

    fn root(dir: &Path) -> Root {
        Root::open(dir).expect("a root")
    }

    fn audio(bytes: Vec<u8>) -> Piece {
        Piece::Audio(Bytes::from(bytes))
    }

    fn noise(bytes: usize) -> Vec<u8> {
        (0..bytes).map(|i| (i * 31 % 255) as u8 + 1).collect()
    }

    fn create(dir: &Path, first: &[Piece]) -> SegmentFile {
        create_as(dir, Utc::now(), PcmFormat::LIVEKIT, first)
    }

    fn create_as(dir: &Path, time: DateTime<Utc>, format: PcmFormat, first: &[Piece]) -> SegmentFile {
        let syncer = Syncer::start().expect("threads");
        SegmentFile::create(&root(dir), &name(), time, format, first, &syncer).expect("a segment")
    }

    fn sealed(segment: SegmentFile) -> Sealed {
        segment.cut().expect("cut").0
    }

    /// The PCM that a player would read, by hound.
    fn read(dir: &Path, segment: &Path) -> Vec<u8> {
        let reader = hound::WavReader::open(dir.join(segment)).expect("a WAV file");
        reader.into_samples::<i16>().flat_map(|sample| sample.expect("a sample").to_le_bytes()).collect()
    }

    #[test]
    fn the_file_is_valid_after_every_append() {
        let dir = tempfile::tempdir().expect("a directory");
        let sound = noise(40_000);
        let mut segment = create(dir.path(), &[audio(sound[..4].to_vec())]);
        let path = segment.relative_path().to_owned();
        for end in (4..sound.len()).step_by(5_996) {
            let next = (end + 5_996).min(sound.len());
            segment.append(&[audio(sound[end..next].to_vec())]).expect("an append");
            assert_eq!(read(dir.path(), &path), sound[..next]);
        }
        assert_eq!(sealed(segment), Sealed { frames: 10_000, bytes: 40_000 });
    }

    #[test]
    fn zeros_are_holes_that_read_as_zeros() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut sound = noise(20_000);
        sound.extend(vec![0; 2_000_000]);
        sound.extend(noise(20_000));
        sound.extend(vec![0; 1_000_000]);
        let mut segment = create(dir.path(), &[audio(sound[..1_920].to_vec())]);
        for piece in sound[1_920..].chunks(19_200) {
            segment.append(&[audio(piece.to_vec()), Piece::Muted(960)]).expect("an append");
        }
        let path = segment.relative_path().to_owned();
        sealed(segment);
        assert_eq!(read(dir.path(), &path), sound);
        let metadata = std::fs::metadata(dir.path().join(&path)).expect("a file");
        assert_eq!(metadata.len(), 44 + sound.len() as u64);
        let allocated = metadata.blocks() * 512;
        assert!(allocated <= 40_000 + 4 * 4_096, "{allocated} bytes allocated for 40 kB of sound");
    }

    #[test]
    fn d1_a_hole_at_the_end_is_in_the_file_before_it_is_declared() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut segment = create(dir.path(), &[Piece::Missing { bytes: 4_000, behind: 400 }]);
        let path = segment.relative_path().to_owned();
        for pieces in [vec![Piece::Missing { bytes: 4_000, behind: 0 }], vec![audio(vec![0; 400])]] {
            segment.append(&pieces).expect("an append");
            let length = std::fs::metadata(dir.path().join(&path)).expect("a file").len();
            assert_eq!(length, 44 + segment.data_bytes());
        }
        assert_eq!(read(dir.path(), &path), vec![0; 8_400]);
    }

    #[test]
    fn lost_audio_keeps_its_length() {
        let dir = tempfile::tempdir().expect("a directory");
        let segment = create(dir.path(), &[audio(noise(400)), Piece::Lost(10_000), audio(noise(400))]);
        let path = segment.relative_path().to_owned();
        assert_eq!(sealed(segment).bytes, 10_800);
        assert_eq!(read(dir.path(), &path), [noise(400), vec![0; 10_000], noise(400)].concat());
    }

    #[test]
    fn what_was_missing_is_put_in_where_it_was_missing() {
        for (behind, bytes) in [(0, 400), (400, 40), (400, 400), (400, 90_000), (12_000, 500), (20_000, 96_000)] {
            let dir = tempfile::tempdir().expect("a directory");
            let sound = noise(20_000);
            let mut segment = create(dir.path(), &[audio(sound.clone())]);
            let (head, tail) = sound.split_at(sound.len() - behind.min(sound.len()));
            segment.append(&[Piece::Missing { bytes, behind: behind as u64 }, audio(noise(80))]).expect("an append");
            let path = segment.relative_path().to_owned();
            sealed(segment);
            assert!(read(dir.path(), &path) == [head, &vec![0; bytes as usize], tail, &noise(80)].concat(), "{bytes} bytes in front of {behind}");
        }
    }

    #[test]
    fn what_was_missing_in_an_earlier_segment_goes_to_the_start_of_this_one() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut segment = create(dir.path(), &[audio(noise(800))]);
        segment.append(&[Piece::Missing { bytes: 400, behind: 90_000 }]).expect("an append");
        let path = segment.relative_path().to_owned();
        sealed(segment);
        assert_eq!(read(dir.path(), &path), [vec![0; 400], noise(800)].concat());
    }

    #[test]
    fn i9_what_was_given_up_while_it_was_written_is_taken_back() {
        let dir = tempfile::tempdir().expect("a directory");
        let sound = noise(20_000);
        let mut segment = create(dir.path(), &[audio(sound.clone())]);
        for pieces in [vec![audio(noise(9_000))], vec![Piece::Missing { bytes: 5_000, behind: 400 }, audio(noise(80))], vec![Piece::Lost(70_000)]] {
            let fence = Fence::default();
            assert!(fence.begin() && fence.give_up());
            assert!(!segment.append_within(&fence, &pieces).expect("an append"));
            assert!(read(dir.path(), segment.relative_path()) == sound, "{pieces:?}");
            let length = std::fs::metadata(dir.path().join(segment.relative_path())).expect("a file").len();
            assert_eq!(length, 44 + 20_000, "a repair would find nothing of it");
        }
        let fence = Fence::default();
        assert!(fence.begin() && segment.append_within(&fence, &[audio(noise(80))]).expect("an append") && !fence.give_up());
        assert_eq!(segment.data_bytes(), 20_080);
    }

    #[test]
    fn an_append_that_fails_costs_nothing_that_was_appended_before() {
        // The last of them is a length that no file system has.
        let fails = |missing| [missing, audio(noise(80)), Piece::Lost(i64::MAX as u64)];
        let moving = [(40, 400), (5_000, 400), (400, 90_000)].map(|(bytes, behind)| Piece::Missing { bytes, behind });
        for missing in moving.into_iter().chain([Piece::Muted(4), audio(noise(9_000))]) {
            let dir = tempfile::tempdir().expect("a directory");
            let sound = noise(20_000);
            let mut segment = create(dir.path(), &[audio(sound.clone())]);
            let path = segment.relative_path().to_owned();
            let file = || std::fs::read(dir.path().join(&path)).expect("read");
            let before = file();
            assert!(segment.append(&fails(missing.clone())).is_err());
            assert!(file() == before, "{missing:?} is taken back at once");
            // Whatever it had come to: the disk may have failed the taking back too.
            segment.is_untidy = true;
            assert!(segment.write(&[missing.clone(), audio(noise(80))]).is_ok() && file() != before);
            segment.append(&[audio(noise(400))]).expect("an append");
            assert!(read(dir.path(), &path) == [sound.clone(), noise(400)].concat(), "{missing:?} is taken back by the next append");
            segment.is_untidy = true;
            assert!(segment.write(&[missing.clone(), audio(noise(80))]).is_ok());
            assert_eq!(sealed(segment).bytes, 20_400);
            assert!(read(dir.path(), &path) == [sound, noise(400)].concat() && file().len() == 20_444, "{missing:?} is taken back at the end");
        }
    }

    #[test]
    fn a_taken_name_is_never_replaced() {
        let dir = tempfile::tempdir().expect("a directory");
        let time = Utc::now();
        let make = |sound: Vec<u8>| create_as(dir.path(), time, PcmFormat::LIVEKIT, &[audio(sound)]);
        let paths: Vec<PathBuf> = [4, 8, 12].map(|bytes| make(noise(bytes)).relative_path().to_owned()).into();
        assert_eq!(paths.iter().map(|path| read(dir.path(), path).len()).collect::<Vec<_>>(), [4, 8, 12]);
    }

    #[test]
    fn correcting_the_format_keeps_every_byte() {
        let dir = tempfile::tempdir().expect("a directory");
        let mono = PcmFormat { channels: 1, ..PcmFormat::LIVEKIT };
        let mut segment = create_as(dir.path(), Utc::now(), mono, &[audio(noise(800))]);
        segment.set_format(PcmFormat::LIVEKIT).expect("corrected");
        segment.append(&[audio(noise(400))]).expect("an append");
        let path = segment.relative_path().to_owned();
        assert_eq!(sealed(segment).frames, 300);
        assert_eq!(hound::WavReader::open(dir.path().join(&path)).expect("a WAV file").spec().channels, 2);
        assert_eq!(read(dir.path(), &path), [noise(800), noise(400)].concat());
    }

    #[test]
    fn what_cannot_be_written_leaves_nothing_under_the_name() {
        let dir = tempfile::tempdir().expect("a directory");
        let syncer = Syncer::start().expect("threads");
        // A length that no file system has.
        let endless = [audio(noise(4)), Piece::Lost(i64::MAX as u64)];
        assert!(SegmentFile::create(&root(dir.path()), &name(), Utc::now(), PcmFormat::LIVEKIT, &endless, &syncer).is_err());
        let left = std::fs::read_dir(dir.path().join("RM_1")).expect("the meeting's directory").count();
        assert_eq!(left, 0);
    }
}
