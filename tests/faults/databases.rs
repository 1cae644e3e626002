//! A database that is no database any more, or is gone, when the server starts.

use std::path::Path;

use crate::ingest_errors::{PATH, pcm_of, recording_of};
use crate::support::egress_peer::{EgressPeer, counter_pcm};
use crate::support::test_app::{ADMIN_KEY, Finished, Stopped, TestApp, run};

const FILE: &str = "storage/live-meeting.db";

/// What is made of a file's content.
type Spoil = fn(Vec<u8>) -> Vec<u8>;

/// A server that has recorded something and ended.
async fn recorded() -> (Stopped, Vec<u8>) {
    let app = TestApp::builder().open().start().await;
    let pcm = counter_pcm(9_600, 1);
    let mut peer = EgressPeer::connect(app.addr, PATH).await.unwrap();
    peer.send_pcm(&pcm).await.unwrap();
    peer.close_and_wait().await;
    (app.terminate().await.2, pcm)
}

/// Without what SQLite keeps beside its file.
fn keep_only_the_file(dir: &Path) {
    for beside in ["-wal", "-shm"] {
        std::fs::remove_file(dir.join(format!("{FILE}{beside}"))).ok(); // an orderly end leaves none
    }
}

#[tokio::test]
async fn a_database_that_is_torn_is_named_and_not_touched_and_nor_is_any_recording() {
    let spoils: [(&str, Spoil); 3] = [
        ("another file", |_| b"this is not a database. ".repeat(100)),
        ("its first half", |whole| whole[..whole.len() / 2 / 4_096 * 4_096].to_vec()),
        ("its pages overwritten", |whole| whole.iter().enumerate().map(|(at, byte)| if at < 4_096 { *byte } else { byte ^ 0x5a }).collect()),
    ];
    for (case, spoil) in spoils {
        let (stopped, pcm) = recorded().await;
        let (dir, wav) = (stopped.dir.path(), stopped.wav_files().remove(0));
        keep_only_the_file(dir);
        let whole = std::fs::read(dir.join(FILE)).unwrap();
        let torn = spoil(whole);
        std::fs::write(dir.join(FILE), &torn).unwrap();
        let before = std::fs::read(&wav).unwrap();
        let env = [("HOST", "127.0.0.1"), ("PORT", "0"), ("ADMIN_API_KEY", ADMIN_KEY), ("LIVE_MEETING__INGEST__AUTH", "open")];
        let Finished { code, stderr, .. } = run(dir, &env, &["serve"]).await;
        assert!(code.is_some_and(|code| code != 0), "{case}: {stderr}");
        let last = stderr.lines().last().unwrap();
        assert!(last.contains(FILE) && (last.contains("not a database") || last.contains("malformed")), "{case}: {stderr}");
        assert!(std::fs::read(dir.join(FILE)).unwrap() == torn, "{case}: it is left for whoever mends it");
        assert!(std::fs::read(&wav).unwrap() == before && before.ends_with(&pcm), "{case}");
    }
}

#[tokio::test]
async fn a_database_that_is_gone_is_made_anew_and_no_recording_is_touched() {
    let (stopped, pcm) = recorded().await;
    let (dir, wav) = (stopped.dir.path(), stopped.wav_files().remove(0));
    let files = || [wav.clone(), format!("{}.json", wav.display()).into()].map(|file| std::fs::read(file).unwrap());
    let before = files();
    keep_only_the_file(dir);
    std::fs::remove_file(dir.join(FILE)).unwrap();
    let app = stopped.restart().await;
    let mut peer = EgressPeer::connect(app.addr, PATH).await.unwrap();
    peer.send_pcm(&pcm).await.unwrap();
    peer.close_and_wait().await;
    assert!(pcm_of(&app, &recording_of(&app, "ana").await) == pcm, "the next meeting is recorded");
    assert!(files() == before && app.wav_files().len() == 2);
}
