//! Audio that moves within its file, written down beside it first: `.<name>.move`.
//!
//! Silence that a sender left out is put in front of what has come since, which makes room for it. Killed in the middle of that, the file would hold some
//! audio twice, or nowhere; so a repair puts back what was written down, and the append is as if it had never begun. A record counts for as long as the
//! header declares no more than it did then: it is the last thing that an append writes. It stays until its file is on the disk to its end.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::root::Directory;
use super::sidecar::no_follow;
use super::wav_header::{self, HEADER_BYTES};

/// The first line of a record; the audio follows.
#[derive(Debug, Serialize, Deserialize)]
struct Head {
    /// Bytes of PCM that the file declared.
    end: u64,
    /// How many of these move, the last ones.
    bytes: usize,
    crc32: u32,
}

/// What moves in an open file.
#[derive(Debug)]
pub struct Moving {
    directory: Directory,
    end: u64,
    audio: Vec<u8>,
    record: Arc<File>,
}

impl Moving {
    /// Writes down the last bytes of a file that declares `end` bytes of PCM.
    ///
    /// # Errors
    /// What the file system says; then there is no record.
    pub fn note(directory: &Directory, file: &str, end: u64, audio: Vec<u8>) -> io::Result<Self> {
        let name = name_of(file);
        let head = Head { end, bytes: audio.len(), crc32: crc32fast::hash(&audio) };
        let written = directory.create_over(&name).and_then(|mut record| {
            let mut text = serde_json::to_vec(&head)?;
            text.push(b'\n');
            text.extend_from_slice(&audio);
            record.write_all(&text)?;
            Ok(record)
        });
        match written {
            Ok(record) => Ok(Self { directory: directory.clone(), end, audio, record: Arc::new(record) }),
            Err(error) => {
                forget(directory.remove(&name), &name);
                Err(error)
            }
        }
    }

    pub fn audio(&self) -> &[u8] {
        &self.audio
    }

    /// What must be on the disk before anything moves.
    pub fn wanted(&self) -> Vec<Arc<File>> {
        vec![Arc::clone(&self.record), self.directory.handle()]
    }

    /// Makes the audio that moves what it was.
    ///
    /// # Errors
    /// What the file system says.
    pub fn put_back(&self, file: &File) -> io::Result<()> {
        put_back(file, self.end, &self.audio)
    }
}

/// What was written down of a move that has not come to its end.
pub struct Begun {
    end: u64,
    audio: Vec<u8>,
}

impl Begun {
    /// What was moving in a file that nobody writes any more. A record that is torn was written when nothing had moved yet.
    ///
    /// # Errors
    /// What the file system says.
    pub fn of(file: &File, media: &Path) -> io::Result<Option<Self>> {
        let mut text = Vec::new();
        match no_follow(OpenOptions::new().read(true)).open(path_of(media)).and_then(|mut record| record.read_to_end(&mut text)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            read => read?,
        };
        let mut header = [0; 44];
        file.read_exact_at(&mut header, 0)?;
        let declared = wav_header::declared(&header).map_or(0, |(_, bytes)| bytes);
        Ok(read(&text).filter(|begun| declared <= begun.end))
    }

    /// How long the file was.
    pub fn file_bytes(&self) -> u64 {
        HEADER_BYTES + self.end
    }

    /// Makes the file what it was. Killed in the middle, it can be done again.
    ///
    /// # Errors
    /// What the file system says.
    pub fn undo(&self, file: &File) -> io::Result<()> {
        put_back(file, self.end, &self.audio)?;
        file.set_len(self.file_bytes())
    }
}

/// The file is on the disk, and nothing moves any more.
pub fn remove(directory: &Directory, file: &str) {
    let name = name_of(file);
    forget(directory.remove(&name), &name);
}

/// The same of a file that only its path tells.
pub fn remove_of(media: &Path) {
    let path = path_of(media);
    forget(std::fs::remove_file(&path), &path.to_string_lossy());
}

fn put_back(file: &File, end: u64, audio: &[u8]) -> io::Result<()> {
    let bytes = u64::try_from(audio.len()).unwrap_or(u64::MAX);
    file.write_all_at(audio, HEADER_BYTES + end.saturating_sub(bytes))
}

fn read(text: &[u8]) -> Option<Begun> {
    let (head, audio) = text.split_at_checked(text.iter().position(|byte| *byte == b'\n')?)?;
    let (head, audio): (Head, &[u8]) = (serde_json::from_slice(head).ok()?, audio.get(1..)?);
    let is_whole = audio.len() == head.bytes && crc32fast::hash(audio) == head.crc32;
    is_whole.then(|| Begun { end: head.end, audio: audio.to_vec() })
}

fn forget(removed: io::Result<()>, name: &str) {
    if let Err(error) = removed
        && error.kind() != io::ErrorKind::NotFound
    {
        log::warn!("what was written down of audio that moved is left name={name:?} error={error}");
    }
}

fn path_of(media: &Path) -> std::path::PathBuf {
    media.with_file_name(name_of(&media.file_name().unwrap_or_default().to_string_lossy()))
}

fn name_of(file: &str) -> String {
    format!(".{file}.move")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audio::format::PcmFormat;
    use crate::recording::repair::{Interrupted, Outcome, repair};
    use crate::recording::root::Root;

    fn noise(bytes: usize) -> Vec<u8> {
        (0..bytes).map(|i| (i * 31 % 255) as u8 + 1).collect()
    }

    struct Stage {
        dir: tempfile::TempDir,
        file: File,
        moving: Moving,
    }

    const END: usize = 40_000;

    impl Stage {
        /// A file of which the last `behind` bytes are about to move.
        fn set(behind: usize) -> Self {
            let dir = tempfile::tempdir().expect("a directory");
            let directory = Root::open(dir.path()).and_then(|root| root.make_directory("RM_1".as_ref())).expect("a directory");
            let file = directory.create_new("x.wav").expect("made");
            file.write_all_at(&[wav_header::encode(PcmFormat::LIVEKIT, END as u64).to_vec(), noise(END)].concat(), 0).expect("written");
            let moving = Moving::note(&directory, "x.wav", END as u64, noise(END)[END - behind..].to_vec()).expect("noted");
            Self { dir, file, moving }
        }

        fn media(&self) -> std::path::PathBuf {
            self.dir.path().join("RM_1/x.wav")
        }

        /// What a repair makes of it: its PCM.
        fn repaired(&self) -> Vec<u8> {
            let Ok(Outcome::Recovered(sidecar)) = repair(&Interrupted::file(self.media())) else { panic!("it is repaired") };
            let mut names: Vec<_> =
                std::fs::read_dir(self.dir.path().join("RM_1")).expect("listed").map(|entry| entry.expect("an entry").file_name()).collect();
            names.sort();
            assert_eq!(names, ["x.wav", "x.wav.json"]);
            let text = std::fs::read(self.media()).expect("read");
            assert_eq!(text[..44], wav_header::encode(PcmFormat::LIVEKIT, sidecar.bytes));
            assert_eq!(text.len() as u64, HEADER_BYTES + sidecar.bytes);
            text[44..].to_vec()
        }
    }

    /// Holes that are shorter and longer than what lies behind them.
    const MOVES: [(usize, usize); 4] = [(4_000, 400), (400, 4_000), (END, 8_000), (12_000, 12_000)];

    #[test]
    fn d1_d2_an_append_that_is_killed_while_it_moves_audio_has_never_begun() {
        for (behind, hole) in MOVES {
            for moved in (0..=behind).step_by(behind / 4) {
                for step in 0..3 {
                    let stage = Stage::set(behind);
                    let start = HEADER_BYTES + (END - behind) as u64;
                    stage.file.write_all_at(&stage.moving.audio()[..moved], start + hole as u64).expect("moved");
                    if step > 0 {
                        // What came with it.
                        stage.file.write_all_at(&noise(3_840), HEADER_BYTES + (END + hole) as u64).expect("appended");
                    }
                    if step > 1 {
                        stage.file.write_all_at(&vec![0; hole], start).expect("emptied");
                    }
                    assert!(stage.repaired() == noise(END), "{moved} of {behind} bytes had moved by {hole}, step {step}");
                }
            }
        }
    }

    #[test]
    fn d2_a_repair_that_is_killed_while_it_puts_audio_back_is_done_again() {
        let stage = Stage::set(4_000);
        stage.file.write_all_at(&vec![0; 8_000], HEADER_BYTES + (END - 4_000) as u64).expect("emptied");
        let begun = Begun::of(&stage.file, &stage.media()).expect("read").expect("there");
        begun.undo(&stage.file).expect("undone");
        stage.file.write_all_at(&[0; 400], HEADER_BYTES + (END - 4_000) as u64).expect("half of it");
        assert!(stage.repaired() == noise(END));
    }

    #[test]
    fn a_move_that_the_header_declares_is_over_whatever_is_left_of_its_record() {
        let stage = Stage::set(4_000);
        let expected = [noise(END)[..END - 4_000].to_vec(), vec![0; 8_000], noise(END)[END - 4_000..].to_vec()].concat();
        stage.file.write_all_at(&expected, HEADER_BYTES).expect("moved");
        stage.file.write_all_at(&wav_header::encode(PcmFormat::LIVEKIT, expected.len() as u64), 0).expect("declared");
        assert!(stage.repaired() == expected);
    }

    #[test]
    fn a_file_whose_record_cannot_be_read_waits_for_its_repair() {
        let stage = Stage::set(4_000);
        stage.file.write_all_at(&vec![0; 8_000], HEADER_BYTES + (END - 4_000) as u64).expect("emptied");
        let record = stage.dir.path().join("RM_1/.x.wav.move");
        let elsewhere = stage.dir.path().join("elsewhere");
        std::fs::rename(&record, &elsewhere).expect("moved");
        std::os::unix::fs::symlink(&elsewhere, &record).expect("a link, which is not followed");
        assert!(repair(&Interrupted::file(stage.media())).is_err());
        std::fs::rename(&elsewhere, &record).expect("back");
        assert!(stage.repaired() == noise(END));
    }

    #[test]
    fn a_record_that_is_torn_was_written_before_anything_moved() {
        let whole = std::fs::read(Stage::set(400).dir.path().join("RM_1/.x.wav.move")).expect("read");
        for length in (0..whole.len()).step_by(7) {
            let stage = Stage::set(400);
            std::fs::write(stage.dir.path().join("RM_1/.x.wav.move"), &whole[..length]).expect("torn");
            assert!(Begun::of(&stage.file, &stage.media()).expect("read").is_none(), "{length} bytes of it");
            assert!(stage.repaired() == noise(END));
        }
    }
}
