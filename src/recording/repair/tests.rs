use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use super::*;
use crate::recording::sidecar::MediaFormat;
use crate::recording::wav_header;

const FORMAT: PcmFormat = PcmFormat::LIVEKIT;

/// A header that declares these sizes, of RIFF and of the data.
fn header(riff: u32, data: u32) -> Vec<u8> {
    let mut header = wav_header::encode(FORMAT, 0).to_vec();
    header[4..8].copy_from_slice(&riff.to_le_bytes());
    header[40..44].copy_from_slice(&data.to_le_bytes());
    header
}

fn sound(frames: u64) -> Measured {
    let (length, bytes) = (Some(FORMAT.duration_of_frames(frames)), frames * FORMAT.frame_bytes());
    Measured { format: MediaFormat::Wav, pcm: Some(FORMAT), dimensions: None, frames, bytes, length, header: None, cut: None }
}

fn noise(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|at| (at * 31 % 251) as u8 | 1).collect()
}

/// What a WAV reader finds, and what the file holds.
fn read(path: &Path) -> Vec<u8> {
    let reader = hound::WavReader::open(path).expect("a WAV file");
    reader.into_samples::<i16>().flat_map(|sample| sample.expect("a sample").to_le_bytes()).collect()
}

fn recovered(outcome: Outcome) -> Sidecar {
    match outcome {
        Outcome::Recovered(sidecar) => *sidecar,
        other @ (Outcome::Sealed(_) | Outcome::Bad(_) | Outcome::InUse) => panic!("{other:?}"),
    }
}

fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).expect("listed").map(|entry| entry.expect("an entry").file_name().into_string().expect("text"));
    let mut names: Vec<String> = entries.collect();
    names.sort();
    names
}

#[test]
fn d4_every_state_of_sizes_and_tail_becomes_the_files_true_length() {
    let second = 192_000;
    let states = [
        ("correct", header(36 + second, second), 0),
        ("sizes of a header that was never patched", header(0, 0), 0),
        ("sizes of an empty file", header(36, 0), 0),
        ("unknown sizes", header(u32::MAX, u32::MAX), 0),
        ("the unknown sizes of SoX", header(0x7fff_f024, 0x7fff_f000), 0),
        ("lagging", header(36 + second / 2, second / 2), 0),
        ("promising too much", header(36 + 2 * second, 2 * second), 0),
        ("two sizes that disagree", header(36 + second / 2, second), 0),
        ("a torn frame", header(36, 0), 3),
        ("an odd byte", header(36 + second, second), 1),
    ];
    for (state, header, torn) in states {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("20261120T105312.345Z_room_ana_TR_1.wav");
        let pcm = noise(192_000);
        std::fs::write(&path, [header, pcm.clone(), vec![9; torn]].concat()).expect("written");
        let sidecar = recovered(repair(&Interrupted::file(path.clone())).expect("repaired"));
        assert!(read(&path) == pcm, "{state}");
        assert_eq!(std::fs::metadata(&path).expect("there").len(), 44 + 192_000, "{state}");
        assert_eq!((sidecar.frames, sidecar.bytes, sidecar.recovered, &*sidecar.end_reason), (48_000, 192_000, true, "crashed"), "{state}");
        assert_eq!(sidecar.started_at.to_rfc3339(), "2026-11-20T10:53:12.345+00:00");
        assert_eq!(sidecar.tail_unverified_ms, 0, "the machine runs since before the test");
        let before = std::fs::read(&path).expect("read");
        assert_eq!(repair(&Interrupted::file(path.clone())).expect("no fault"), Outcome::Sealed(Box::new(sidecar.clone())), "{state}");
        assert_eq!(Sidecar::read(&path).expect("read"), Some(sidecar));
        assert!(std::fs::read(&path).expect("read") == before, "{state}");
        assert_eq!(names(dir.path()).len(), 2, "{state}: the file and its sidecar");
    }
}

#[test]
fn d4_what_is_shorter_than_a_header_is_kept_under_another_name() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("x.wav");
    for (content, aside) in [(vec![], "x.wav.bad"), (vec![7; 20], "x.wav.1.bad"), (header(36, 0)[..43].to_vec(), "x.wav.2.bad")] {
        std::fs::write(&path, &content).expect("written");
        let aside = dir.path().join(aside);
        assert_eq!(mend_dry(&path).expect("no fault"), Outcome::Bad(dir.path().join("x.wav.bad")));
        assert_eq!(repair(&Interrupted::file(path.clone())).expect("no fault"), Outcome::Bad(aside.clone()));
        assert!(!path.exists());
        assert_eq!(std::fs::read(&aside).expect("kept"), content);
    }
}

fn mend_dry(path: &Path) -> io::Result<Outcome> {
    repair_all(&[Interrupted::file(path.to_owned())], Mode::DryRun, || {}).remove(0)
}

#[test]
fn d4_what_is_not_ours_is_left_alone() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut foreign = header(36, 0);
    foreign[20] = 3;
    let rf64 = [b"RF64\xff\xff\xff\xffWAVEds64".to_vec(), vec![1; 200]].concat();
    for content in [foreign, rf64, vec![1; 200], vec![0; 200]] {
        let path = dir.path().join("x.wav");
        std::fs::write(&path, &content).expect("written");
        assert_eq!(repair(&Interrupted::file(path.clone())).expect_err("not ours").kind(), io::ErrorKind::InvalidData);
        assert_eq!(std::fs::read(&path).expect("read"), content);
        assert_eq!(names(dir.path()), ["x.wav"]);
    }
}

#[test]
fn a_header_that_never_reached_the_disk_is_made_of_what_the_row_says() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("x.wav");
    std::fs::write(&path, [vec![0; 44], noise(400)].concat()).expect("written");
    let interrupted = Interrupted { format: Some(FORMAT), ..Interrupted::file(path.clone()) };
    assert_eq!(recovered(repair(&interrupted).expect("repaired")).frames, 100);
    assert_eq!(read(&path), noise(400));
}

#[test]
fn audio_past_the_longest_header_is_not_cut_off() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("x.wav");
    std::fs::write(&path, header(36, 0)).expect("written");
    let length = 44 + wav_header::MAX_DATA_BYTES + 4_096;
    File::options().write(true).open(&path).and_then(|file| file.set_len(length)).expect("a sparse file");
    let sidecar = recovered(repair(&Interrupted::file(path.clone())).expect("repaired"));
    assert_eq!(sidecar.bytes, wav_header::MAX_DATA_BYTES / 4 * 4);
    assert_eq!(std::fs::metadata(&path).expect("there").len(), length);
}

#[test]
fn a_tail_is_doubted_only_if_the_machine_was_started_since() {
    let second = |seconds: u64| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
    let interrupted = Interrupted::file("/none/x.wav".into());
    let tail = |frames, booted| describe(&interrupted, &sound(frames), &Known::default(), second(100), booted).tail_unverified_ms;
    assert_eq!(tail(480_000, Some(second(50))), 0, "the page cache was not lost");
    assert_eq!(tail(480_000, Some(second(101))), 2_000);
    assert_eq!(tail(48_000, Some(second(101))), 1_000, "not more than there is");
    assert_eq!(tail(480_000, None), 2_000, "nobody knows");
    assert!(booted_at().is_some_and(|booted| booted < SystemTime::now()));
}

#[test]
fn d4_what_an_interrupted_repair_found_out_is_kept() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("x.wav");
    std::fs::write(&path, [header(36, 0), noise(400)].concat()).expect("written");
    let old = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
    File::options().write(true).open(&path).and_then(|file| file.set_modified(old)).expect("an old file");
    // Killed after the header was written, which made the file new.
    let first = match mend(&Interrupted::file(path.clone()), Mode::Repair, booted_at()).expect("mended") {
        Mended::Unsynced(unsynced) => unsynced.sidecar,
        Mended::Ready(outcome) => panic!("{outcome:?}"),
    };
    assert_eq!((first.tail_unverified_ms, first.ended_at.timestamp()), (2, 1_000_000), "all 100 frames of it");
    assert!(std::fs::metadata(&path).expect("there").modified().expect("a time") > old);
    assert_eq!(recovered(repair(&Interrupted::file(path.clone())).expect("repaired")), *first);
}

#[test]
fn d5_what_a_writer_said_of_a_failed_sync_is_not_forgotten_by_a_repair() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("x.wav");
    std::fs::write(&path, [header(36, 0), noise(400)].concat()).expect("written");
    // Killed before the draft of the sidecar had its name; the writer counted what the file no longer holds.
    let told = describe(&Interrupted::file(path.clone()), &sound(200), &Known::default(), SystemTime::now(), None);
    Sidecar { recovered: false, suspect: true, ..told }.draft(&path).expect("a draft");
    let repaired = recovered(repair(&Interrupted::file(path)).expect("repaired"));
    assert_eq!((repaired.frames, repaired.recovered, repaired.suspect, repaired.tail_unverified_ms), (100, true, true, 0));
}

#[test]
fn nobody_repairs_what_another_writes_and_a_dry_run_changes_nothing() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("x.wav");
    let content = [header(36, 0), noise(401)].concat();
    std::fs::write(&path, &content).expect("written");
    let writer = File::options().write(true).open(&path).expect("opened");
    assert!(lock::hold(&writer).expect("locks"));
    assert_eq!(repair(&Interrupted::file(path.clone())).expect("no fault"), Outcome::InUse);
    drop(writer);
    assert_eq!(recovered(mend_dry(&path).expect("no fault")).frames, 100);
    assert_eq!((std::fs::read(&path).expect("read"), names(dir.path())), (content, vec!["x.wav".to_owned()]));
}

#[test]
fn links_are_not_followed() {
    let dir = tempfile::tempdir().expect("a directory");
    let (inside, canary) = (dir.path().join("audio"), dir.path().join("canary.wav"));
    std::fs::create_dir(&inside).expect("made");
    std::fs::write(&canary, [header(36, 0), noise(401)].concat()).expect("written");
    let inode = std::fs::metadata(&canary).expect("there").mtime_nsec();
    std::os::unix::fs::symlink(&canary, inside.join("x.wav")).expect("linked");
    std::os::unix::fs::symlink(dir.path(), inside.join("up")).expect("linked");
    assert!(repair(&Interrupted::file(inside.join("x.wav"))).is_err());
    assert!(look(&inside).unsealed.is_empty());
    assert_eq!((std::fs::metadata(&canary).expect("there").mtime_nsec(), std::fs::metadata(&canary).expect("there").len()), (inode, 445));
}

#[test]
fn a_segment_in_its_first_moment_gets_a_name_if_it_holds_anything() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = |name: &str, content: &[u8]| std::fs::write(dir.path().join(name), content).expect("written");
    file(".a.new", &[header(36, 0), noise(400)].concat());
    file(".b.new", b"");
    file(".c.new", &[vec![0; 44], noise(400)].concat());
    file(".x.wav.json.new", b"{");
    file(
        ".y.new",
        &[&b"DKIF\0\0\x20\0VP80\x80\x02\x68\x01\xe8\x03\0\0\x01\0\0\0\0\0\0\0\0\0\0\0"[..], &[2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7, 7]].concat(),
    );
    file(".z.new", &[0, 0, 0, 1, 0x65, 0x88]);
    let found = look(dir.path());
    assert_eq!((found.unfinished.len(), found.unsealed.len()), (5, 0));
    let adopted: Vec<Adopted> = found.unfinished.iter().map(|path| adopt(path, Mode::Repair).expect("no fault")).collect();
    let Adopted::Named(named) = &adopted[0] else { panic!("{adopted:?}") };
    assert!(named.to_string_lossy().ends_with("Z_unfinished_a.wav"), "{named:?}");
    assert_eq!(adopted[1..3], [Adopted::Left, Adopted::Left]);
    for (adopted, kind) in adopted[3..].iter().zip(["ivf", "h264"]) {
        let Adopted::Named(named) = adopted else { panic!("{adopted:?}") };
        assert_eq!(named.extension(), Some(std::ffi::OsStr::new(kind)));
        assert_eq!(recovered(repair(&Interrupted::file(named.clone())).expect("repaired")).frames, 1);
    }
    assert_eq!(recovered(repair(&Interrupted::file(named.clone())).expect("repaired")).frames, 100);
    assert_eq!(names(dir.path()).len(), 9, "nothing is deleted");
}

#[test]
fn many_files_are_told_in_their_order() {
    let dir = tempfile::tempdir().expect("a directory");
    let files: Vec<Interrupted> = (0..600).map(|number| Interrupted::file(dir.path().join(format!("{number:03}.wav")))).collect();
    for (number, file) in files.iter().enumerate().filter(|(number, _)| number % 7 != 0) {
        std::fs::write(&file.path, [header(36, 0), noise(4 * number)].concat()).expect("written");
    }
    let told = AtomicUsize::new(0);
    let outcomes = repair_all(&files, Mode::Repair, || {
        told.fetch_add(1, Relaxed);
    });
    assert_eq!((outcomes.len(), told.into_inner()), (600, 600));
    for (number, outcome) in outcomes.into_iter().enumerate() {
        match outcome {
            Err(error) => assert!(number % 7 == 0 && error.kind() == io::ErrorKind::NotFound, "{number}: {error}"),
            Ok(outcome) => assert_eq!(recovered(outcome).frames, number as u64),
        }
    }
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(64))]
    #[test]
    fn d4_any_bytes_are_kept_or_repaired_and_never_both(
        valid in proptest::bool::ANY,
        mut content in proptest::collection::vec(proptest::num::u8::ANY, 0..300),
    ) {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("x.wav");
        if valid && content.len() >= 44 {
            let sizes = (content[..8].to_vec(), wav_header::encode(FORMAT, 0));
            content[..44].copy_from_slice(&sizes.1);
            content[4..8].copy_from_slice(&sizes.0[..4]);
            content[40..44].copy_from_slice(&sizes.0[4..]);
        }
        std::fs::write(&path, &content).expect("written");
        match repair(&Interrupted::file(path.clone())) {
            Ok(Outcome::Recovered(sidecar)) => {
                let frames = (content.len() - 44) / 4;
                proptest::prop_assert_eq!(sidecar.frames, frames as u64);
                proptest::prop_assert_eq!(read(&path), &content[44..44 + 4 * frames]);
            }
            Ok(Outcome::Bad(aside)) => {
                proptest::prop_assert!(content.len() < 44 && !path.exists());
                proptest::prop_assert_eq!(std::fs::read(aside).expect("kept"), content);
            }
            Err(error) => {
                proptest::prop_assert_eq!(error.kind(), io::ErrorKind::InvalidData);
                proptest::prop_assert_eq!(std::fs::read(&path).expect("kept"), content);
            }
            Ok(other @ (Outcome::Sealed(_) | Outcome::InUse)) => panic!("{other:?}"),
        }
    }
}
