//! One file of video that can be read at every instant.
//!
//! H.264 is a stream of units, any beginning of which is one too. Of IVF the pictures go first and then the header with their count, as in
//! [`super::segment_file`]: a reader, and a crash, may see the header lag behind by one append, never promise too much. What
//! an append that fails has done is taken back, so it can be made again.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use chrono::{DateTime, Utc};

use super::fence::Fence;
use super::finish::Finished;
use super::ivf::{self, Walked};
use super::notes::Notes;
use super::path::SegmentName;
use super::root::{Directory, Root};
use super::syncer::{Syncer, Watched};
use super::unnamed::{Unnamed, file_name};
use super::video_stream::{Picture, VideoFormat};
use crate::video::annex_b::PictureCounter;
use crate::video::codec::Container;
use crate::video::key_frame::Dimensions;

/// How much of an H.264 file is read at once to count its pictures.
const CHUNK_BYTES: usize = 64 << 10;

/// A file of video that is finished, or as far as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SealedVideo {
    pub pictures: u64,
    /// Of the whole file.
    pub bytes: u64,
    /// Of the first key frame; not looked for in H.264.
    pub dimensions: Option<Dimensions>,
}

/// What an append makes of the file, if it counts.
struct Appended {
    format: VideoFormat,
    first_time: Option<u64>,
    has_key_frame: bool,
    bytes: u64,
    pictures: u64,
}

/// An open file.
#[derive(Debug)]
pub struct VideoFile {
    file: Arc<File>,
    watched: Watched,
    /// The meeting's.
    directory: Directory,
    /// Relative to the video directory.
    relative: PathBuf,
    started_at: DateTime<Utc>,
    format: VideoFormat,
    /// The time of the first picture, which is 0 in the file where times are those of arrival.
    first_time: Option<u64>,
    /// A key frame of this very file has told its size.
    has_key_frame: bool,
    bytes: u64,
    pictures: u64,
    /// An append is under way, or left something behind that could not be taken back yet.
    is_untidy: bool,
}

impl VideoFile {
    /// Makes the file with its first pictures. It appears under its name complete, and never in the place of another: where the name is taken,
    /// the time stamp moves on by a millisecond.
    ///
    /// # Errors
    /// Whatever the file system says; no file is left under the name then.
    pub fn create(root: &Root, name: &SegmentName, time: DateTime<Utc>, format: VideoFormat, first: &[Picture], syncer: &Syncer) -> io::Result<Self> {
        let Unnamed { file, watched, place } = Unnamed::new(root, &name.directory(), syncer)?;
        let bytes = match format {
            VideoFormat::H264 => 0,
            VideoFormat::Ivf { .. } => ivf::HEADER_BYTES,
        };
        let mut video = Self {
            file,
            watched,
            directory: place.directory.clone(),
            relative: PathBuf::new(),
            started_at: time,
            format,
            first_time: None,
            has_key_frame: false,
            bytes,
            pictures: 0,
            is_untidy: false,
        };
        video.relative = place.keep(video.append(first), time, |time| name.file_of(time, format.container()))?;
        syncer.sync_name(&video.watched, video.directory.handle());
        Ok(video)
    }

    /// The path below the video directory.
    pub fn relative_path(&self) -> &Path {
        &self.relative
    }

    /// How far the file is.
    pub fn state(&self) -> SealedVideo {
        let dimensions = match self.format {
            VideoFormat::H264 => None,
            VideoFormat::Ivf { format, .. } => format.dimensions,
        };
        SealedVideo { pictures: self.pictures, bytes: self.bytes, dimensions }
    }

    /// When the first picture came.
    pub fn started_at(&self) -> DateTime<Utc> {
        self.started_at
    }

    /// What it does not show, to be told beside it.
    pub fn notes(&self, syncer: &Syncer) -> Notes {
        Notes::new(syncer.clone(), self.directory.clone(), file_name(&self.relative))
    }

    /// Whether the disk has said that it lost something of the file.
    pub fn is_suspect(&self) -> bool {
        self.watched.has_failed()
    }

    /// Appends pictures and then counts them in the header. After an error none of them counts or is in the way.
    ///
    /// # Errors
    /// Whatever the file system says.
    pub fn append(&mut self, pictures: &[Picture]) -> io::Result<()> {
        let appended = self.write_or_take_back(pictures)?;
        self.count(appended);
        Ok(())
    }

    /// The same, of an append that has begun. Returns whether it counts; what was given up meanwhile is taken back, for it is in another file by then.
    ///
    /// # Errors
    /// Whatever the file system says.
    pub fn append_within(&mut self, fence: &Fence, pictures: &[Picture]) -> io::Result<bool> {
        let appended = self.write_or_take_back(pictures)?;
        if fence.finish() {
            self.count(appended);
            return Ok(true);
        }
        self.take_back()?;
        Ok(false)
    }

    fn count(&mut self, appended: Appended) {
        let Appended { format, first_time, has_key_frame, bytes, pictures } = appended;
        self.format = format;
        self.first_time = first_time;
        self.has_key_frame = has_key_frame;
        self.bytes += bytes;
        self.pictures += pictures;
        self.is_untidy = false;
        self.watched.note_written();
    }

    /// Makes the file what it was before the append under way. A disk that fails may not let it: then the next append does it, or the file's end.
    fn take_back(&mut self) -> io::Result<()> {
        if let VideoFormat::Ivf { format, .. } = &self.format {
            self.file.write_all_at(&ivf::encode_header(format, self.pictures), 0)?;
        }
        self.file.set_len(self.bytes)?;
        self.is_untidy = false;
        self.watched.note_written();
        Ok(())
    }

    fn write_or_take_back(&mut self, pictures: &[Picture]) -> io::Result<Appended> {
        if self.is_untidy {
            self.take_back()?;
        }
        self.is_untidy = true;
        let written = self.write(pictures);
        if written.is_err()
            && let Err(error) = self.take_back()
        {
            log::debug!("what an append left behind waits for its end path={:?} error={error}", self.relative);
        }
        written
    }

    fn write(&self, added: &[Picture]) -> io::Result<Appended> {
        let first_time = self.first_time.or_else(|| added.first().map(|first| first.time));
        // One write: pictures are small, and a copy costs less than a call for each.
        let mut data = Vec::with_capacity(added.iter().map(|picture| picture.data.len() + 12).sum());
        for picture in added {
            if let VideoFormat::Ivf { by_arrival, .. } = self.format {
                let zero = if by_arrival { first_time.unwrap_or(0) } else { 0 };
                data.extend(ivf::encode_frame_header(picture.data.len(), picture.time.saturating_sub(zero)));
            }
            data.extend_from_slice(&picture.data);
        }
        self.file.write_all_at(&data, self.bytes)?;
        let pictures = added.iter().map(|picture| picture.pictures).sum::<u64>();
        let mut declared = self.format;
        let told = added.iter().find_map(|picture| picture.dimensions).filter(|_| !self.has_key_frame);
        if let VideoFormat::Ivf { format, .. } = &mut declared {
            format.dimensions = told.or(format.dimensions);
            self.file.write_all_at(&ivf::encode_header(format, self.pictures + pictures), 0)?;
        }
        let bytes = u64::try_from(data.len()).unwrap_or(u64::MAX);
        Ok(Appended { format: declared, first_time, has_key_frame: self.has_key_frame || told.is_some(), bytes, pictures })
    }

    /// Removes the file: nothing in it counts.
    ///
    /// # Errors
    /// Whatever the file system says.
    pub fn discard(self) -> io::Result<()> {
        self.directory.remove(&file_name(&self.relative))
    }

    /// Finishes the file: cut to what counts, and still to be handed to the disk.
    ///
    /// # Errors
    /// Whatever the file system says; the file can be read all the same.
    pub fn cut(mut self) -> io::Result<(SealedVideo, Finished)> {
        let state = self.state();
        if self.is_untidy {
            self.take_back()?;
        }
        let name = file_name(&self.relative);
        Ok((state, Finished { file: self.file, watched: self.watched, directory: self.directory, name }))
    }
}

/// What a file that grows holds by now.
///
/// # Errors
/// What the file system says, or [`io::ErrorKind::InvalidData`] for a file that this program did not write.
pub fn declared_video(root: &Root, path: &Path) -> io::Result<SealedVideo> {
    let file = root.open_file(path)?;
    let bytes = file.metadata()?.len();
    match Container::of(path) {
        Container::Ivf => {
            let mut header = [0; 32];
            file.read_exact_at(&mut header, 0)?;
            let header = ivf::decode_header(&header).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "the header is not one of ours"))?;
            Ok(SealedVideo { pictures: header.pictures.into(), bytes, dimensions: header.format.dimensions })
        }
        Container::H264 | Container::Wav => Ok(SealedVideo { pictures: 0, bytes, dimensions: None }),
    }
}

/// What a file that a crash left behind holds in whole pictures, and the header that says so. H.264 has none: every beginning of a stream is one.
///
/// # Errors
/// What the file system says, or [`io::ErrorKind::InvalidData`] for a file that this program did not write.
pub fn measure(file: &File, container: Container) -> io::Result<(SealedVideo, Option<[u8; 32]>)> {
    match container {
        Container::Ivf => {
            let Walked { bytes, pictures, format } = ivf::walk(file.metadata()?.len(), |buffer, at| file.read_exact_at(buffer, at))?;
            Ok((SealedVideo { pictures, bytes, dimensions: format.dimensions }, Some(ivf::encode_header(&format, pictures))))
        }
        Container::H264 => {
            let (mut counter, mut chunk, mut bytes, mut pictures) = (PictureCounter::default(), vec![0; CHUNK_BYTES], 0, 0);
            loop {
                let read = file.read_at(&mut chunk, bytes)?;
                let Some(read) = chunk.get(..read).filter(|read| !read.is_empty()) else {
                    return Ok((SealedVideo { pictures, bytes, dimensions: None }, None));
                };
                pictures += counter.push(read);
                bytes += u64::try_from(read.len()).unwrap_or(u64::MAX);
            }
        }
        Container::Wav => Err(io::Error::new(io::ErrorKind::InvalidData, "no file of video")),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::time::Instant;

    use bytes::Bytes;
    use proptest::prelude::*;

    use super::*;
    use crate::recording::ivf::IvfFormat;
    use crate::recording::repair::{Interrupted, Outcome, repair};
    use crate::video::codec::VideoCodec;

    const SIZE: Dimensions = Dimensions { width: 320, height: 240 };

    fn name() -> SegmentName {
        SegmentName { meeting: "RM_1".into(), room: "room".into(), participant: None, track: Some("TR_1".into()) }
    }

    fn create(dir: &Path, time: DateTime<Utc>, format: VideoFormat, first: &[Picture]) -> VideoFile {
        let syncer = Syncer::start().expect("threads");
        VideoFile::create(&root(dir), &name(), time, format, first, &syncer).expect("made")
    }

    fn root(dir: &Path) -> Root {
        Root::open(dir).expect("a root")
    }

    fn sealed(video: VideoFile) -> SealedVideo {
        video.cut().expect("cut").0
    }

    fn repaired(path: &Path) -> SealedVideo {
        let until = std::time::Instant::now() + std::time::Duration::from_secs(20);
        let outcome = loop {
            match repair(&Interrupted::file(path.to_owned())).expect("repaired") {
                // A sync of it that is under way holds it.
                Outcome::InUse if std::time::Instant::now() < until => std::thread::yield_now(),
                outcome @ (Outcome::Recovered(_) | Outcome::Sealed(_) | Outcome::Bad(_) | Outcome::InUse) => break outcome,
            }
        };
        match outcome {
            Outcome::Recovered(sidecar) | Outcome::Sealed(sidecar) => SealedVideo {
                pictures: sidecar.frames,
                bytes: sidecar.bytes,
                dimensions: sidecar.width.zip(sidecar.height).map(|(width, height)| Dimensions { width, height }),
            },
            other @ (Outcome::Bad(_) | Outcome::InUse) => panic!("{other:?}"),
        }
    }

    fn by_arrival() -> VideoFormat {
        VideoFormat::Ivf { format: IvfFormat::by_arrival(VideoCodec::Vp8), by_arrival: true }
    }

    fn picture(data: Vec<u8>, time: u64, dimensions: Option<Dimensions>) -> Picture {
        let arrival = super::super::video_stream::Arrival { at: Instant::now(), wall: Utc::now() };
        Picture { data: Bytes::from(data), time, pictures: 1, can_start: dimensions.is_some(), dimensions, arrival }
    }

    #[test]
    fn d1_the_header_counts_what_is_there_after_every_append() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut video = create(dir.path(), Utc::now(), by_arrival(), &[picture(vec![1, 0, 0], 500, None)]);
        let path = dir.path().join(video.relative_path());
        assert!(path.to_string_lossy().ends_with("_room_unknown_TR_1.ivf"), "{path:?}");
        assert_eq!(
            declared_video(&root(dir.path()), path.strip_prefix(dir.path()).expect("below")).expect("a header"),
            SealedVideo { pictures: 1, bytes: 47, dimensions: None }
        );
        video.append(&[picture(vec![7; 10], 540, Some(SIZE)), picture(vec![1, 0, 0], 580, None)]).expect("appended");
        let state = SealedVideo { pictures: 3, bytes: 47 + 22 + 15, dimensions: Some(SIZE) };
        assert_eq!(declared_video(&root(dir.path()), path.strip_prefix(dir.path()).expect("below")).expect("a header"), state);
        let other = Dimensions { width: 640, height: 480 };
        video.append(&[picture(vec![8; 10], 620, Some(other))]).expect("appended");
        let sealed = sealed(video);
        assert_eq!((sealed.pictures, sealed.dimensions), (4, Some(SIZE)), "the first key frame's size stays");
        let bytes = std::fs::read(&path).expect("a file");
        let times: Vec<u64> = [32, 47, 69, 84].iter().map(|at| u64::from_le_bytes(bytes[at + 4..at + 12].try_into().expect("8 bytes"))).collect();
        assert_eq!(times, [0, 40, 80, 120], "from the first picture of the file");
        let mode = |path: &Path| std::fs::metadata(path).expect("there").permissions().mode() & 0o777;
        assert_eq!((mode(&path), mode(path.parent().expect("a directory"))), (0o640, 0o750));
    }

    #[test]
    fn h264_is_stored_as_it_comes() {
        let dir = tempfile::tempdir().expect("a directory");
        let parts: [&[u8]; 3] = [&[0, 0, 0, 1, 0x67, 1], &[0, 0, 1, 0x65, 0x88], &[9, 9, 0, 0, 1, 0x41, 0x9a]];
        let pieces = parts.map(|part| picture(part.to_vec(), 0, None));
        let mut video = create(dir.path(), Utc::now(), VideoFormat::H264, &pieces[..1]);
        video.append(&pieces[1..]).expect("appended");
        let path = dir.path().join(video.relative_path());
        sealed(video);
        assert_eq!(std::fs::read(&path).expect("a file"), parts.concat());
        for _ in 0..2 {
            assert_eq!(repaired(&path), SealedVideo { pictures: 2, bytes: 18, dimensions: None });
        }
    }

    #[test]
    fn a_taken_name_is_never_replaced() {
        let dir = tempfile::tempdir().expect("a directory");
        let time = Utc::now();
        let make = |byte| create(dir.path(), time, by_arrival(), &[picture(vec![byte; 3], 0, None)]);
        let paths = [1, 2, 3].map(|byte| dir.path().join(make(byte).relative_path()));
        let last = paths.map(|path| *std::fs::read(path).expect("a file").last().expect("a byte"));
        assert_eq!(last, [1, 2, 3]);
    }

    #[test]
    fn foreign_files_are_left_alone_and_short_ones_kept_under_another_name() {
        let dir = tempfile::tempdir().expect("a directory");
        for (name, content, is_short) in [("short.ivf", vec![1; 20], true), ("empty.h264", vec![], true), ("foreign.ivf", vec![1; 200], false)] {
            let path = dir.path().join(name);
            std::fs::write(&path, &content).expect("written");
            let kept = match repair(&Interrupted::file(path.clone())) {
                Ok(Outcome::Bad(aside)) => aside,
                Ok(other) => panic!("{other:?}"),
                Err(_) => path.clone(),
            };
            assert_eq!(kept != path, is_short, "{name}");
            assert_eq!(std::fs::read(&kept).expect("read"), content);
        }
    }

    proptest! {
        #[test]
        fn d4_a_torn_tail_is_cut_and_every_whole_picture_kept(sizes in proptest::collection::vec(1usize..50, 1..6), cut in 0usize..400) {
            let dir = tempfile::tempdir().expect("a directory");
            let pictures: Vec<Picture> = sizes.iter().enumerate().map(|(at, size)| picture(vec![at as u8; *size], at as u64, None)).collect();
            let video = create(dir.path(), Utc::now(), by_arrival(), &pictures);
            let path = dir.path().join(video.relative_path());
            drop(video);
            let whole = std::fs::read(&path).expect("a file");
            let cut = cut.clamp(32, whole.len());
            std::fs::write(&path, &whole[..cut]).expect("torn");
            let mut end = 32;
            let kept = sizes.iter().take_while(|size| { end += 12 + **size; end <= cut }).count();
            let bytes = 32 + sizes[..kept].iter().map(|size| 12 + size).sum::<usize>();
            for _ in 0..2 {
                prop_assert_eq!(repaired(&path), SealedVideo { pictures: kept as u64, bytes: bytes as u64, dimensions: None });
                prop_assert_eq!(declared_video(&root(dir.path()), path.strip_prefix(dir.path()).expect("below")).expect("a header").pictures, kept as u64);
                prop_assert_eq!(&std::fs::read(&path).expect("a file")[32..], &whole[32..bytes]);
            }
        }
    }
}
