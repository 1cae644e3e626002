use std::time::Duration;

use chrono::Utc;
use tempfile::TempDir;

use super::*;
use crate::config::DatabaseUrl;
use crate::recording::path::SegmentName;
use crate::recording::segment_file::{Piece, SegmentFile};
use crate::recording::sidecar::{self, Sidecar};
use crate::recording::syncer::Syncer;
use crate::recording::unnamed::Unnamed;
use crate::recording::wav_header;

const PATIENCE: Duration = Duration::from_secs(20);

struct Stage {
    dir: TempDir,
    store: Store,
    shelf: Shelf,
}

impl Stage {
    async fn set() -> Self {
        let dir = TempDir::new().expect("a directory");
        let store = Store::open(&DatabaseUrl::Sqlite(dir.path().join("test.db")), 1).await.expect("a store");
        let root = Root::open(&dir.path().join("audio")).expect("a root");
        root.make_directory("RM".as_ref()).expect("a directory");
        Self { dir, store, shelf: Shelf { format: "wav", media: Container::Wav.into(), root } }
    }

    /// A file of a hundred frames that no header counts.
    fn stray(&self, name: &str) -> PathBuf {
        let path = self.dir.path().join("audio/RM").join(name);
        let mut content = wav_header::encode(PcmFormat::LIVEKIT, 0).to_vec();
        content.extend([7; 400]);
        std::fs::write(&path, content).expect("written");
        path
    }

    async fn recovered(&self) -> Remaining {
        recover(&self.store, std::slice::from_ref(&self.shelf)).await.expect("the database answers")
    }
}

fn names(path: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(path).expect("a directory");
    entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned()).collect()
}

#[tokio::test]
async fn strays_are_sealed_beside_live_recordings_in_their_directory_which_are_left_alone() {
    let stage = Stage::set().await;
    let (stray, unfinished) = (stage.stray("stray.wav"), stage.stray(".0199.new"));
    let begun = stage.recovered().await;
    assert!(unfinished.exists() && !sidecar::path_of(&stray).exists(), "not before the server listens");
    assert_eq!(names(stage.shelf.root.path()), ["RM"], "nothing is left of the look at locks");

    let syncer = Syncer::start().expect("threads");
    let name = SegmentName { meeting: "RM".into(), room: "room".into(), participant: None, track: None };
    let audio = [Piece::Audio(vec![7; 4_000].into())];
    let mut live = SegmentFile::create(&stage.shelf.root, &name, Utc::now(), PcmFormat::LIVEKIT, &audio, &syncer).expect("a file");
    let path = stage.shelf.root.path().join(live.relative_path());
    // The one has written its first audio, the other nothing.
    let [being_made, empty] = [(); 2].map(|()| Unnamed::new(&stage.shelf.root, "RM".as_ref(), &syncer).expect("a file"));
    let header = wav_header::encode(PcmFormat::LIVEKIT, 400);
    std::os::unix::fs::FileExt::write_all_at(&*being_made.file, &[&header[..], &[7; 400]].concat(), 0).expect("written");

    let (unrepaired, looked) = (begun.unrepaired(), begun.looked());
    let done = tokio::time::timeout(PATIENCE, go_on(stage.store.clone(), begun)).await;
    assert!(done.is_ok(), "nothing is left to be tried again: {}", unrepaired.load(Relaxed));
    assert_eq!((unrepaired.load(Relaxed), looked.load(Relaxed)), (0, true));
    let sealed = Sidecar::read(&stray).expect("read").expect("a sidecar");
    assert_eq!((sealed.frames, sealed.recovered), (100, true));
    let adopted = names(&stage.dir.path().join("audio/RM")).into_iter().find(|name| name.ends_with("_unfinished_0199.wav")).expect("it has a name");
    assert!(Sidecar::read(&stray.with_file_name(adopted)).expect("read").is_some());

    assert!(!sidecar::path_of(&path).exists() && std::fs::metadata(&path).expect("it is there").len() == 44 + 4_000);
    live.append(&audio).expect("it goes on");
    assert_eq!(std::fs::metadata(&path).expect("it is there").len(), 44 + 8_000);
    for (made, name) in [(being_made, "a.wav"), (empty, "b.wav")] {
        made.place.keep(Ok(()), Utc::now(), |_| name.into()).expect("it was left where it was");
    }
}

#[tokio::test]
async fn a_stray_that_another_process_writes_is_told() {
    let stage = Stage::set().await;
    let stray = stage.stray("stray.wav");
    let other = std::fs::File::open(&stray).expect("opened");
    assert!(lock::hold(&other).expect("locks"));
    // Older than this run, also for a kernel with slow ticks.
    let made = std::fs::metadata(&stray).and_then(|metadata| metadata.modified()).expect("a time");
    while made.elapsed().is_ok_and(|since| since < 4 * TICK) {
        tokio::task::yield_now().await;
    }
    let begun = stage.recovered().await;
    let unrepaired = begun.unrepaired();
    assert_eq!(unrepaired.load(Relaxed), 0, "nobody has looked yet");
    let told = async {
        while unrepaired.load(Relaxed) != 1 {
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        () = go_on(stage.store.clone(), begun) => panic!("it is left"),
        told = tokio::time::timeout(PATIENCE, told) => told.expect("it is told"),
    }
    assert!(!sidecar::path_of(&stray).exists());
}
