//! I8 and I9: what panics or hangs in one stage of one track, and in the parts that tracks share.
//!
//! The server is built with the feature `fail-points` (`src/fail_point.rs`) and told by its environment where to fail. Deadlines are shortened the same way.

mod hangs;
mod panics;
mod shared;
mod video;

use std::collections::BTreeMap;
use std::time::Duration;

use crate::support::speaker::{Recorded, Spoken, recorded, speak, speech};
use crate::support::test_app::{Builder, TestApp};

const TRACKS: u32 = 20;
/// 3 s.
const MESSAGES: usize = 30;

fn failing(points: &str) -> Builder {
    TestApp::builder().open().env("FAILPOINTS", points)
}

/// Twenty tracks that speak side by side to their end.
async fn twenty_speak(app: &TestApp) -> BTreeMap<u32, Spoken> {
    twenty_speak_for(app, MESSAGES).await
}

async fn twenty_speak_for(app: &TestApp, messages: usize) -> BTreeMap<u32, Spoken> {
    let mut speakers = Vec::new();
    for number in 0..TRACKS {
        speakers.push(speak(app, number, messages).await);
    }
    let mut spoken = BTreeMap::new();
    for speaker in speakers {
        let ended = tokio::time::timeout(Duration::from_secs(60), speaker).await.expect("nobody speaks for ever").unwrap();
        spoken.insert(ended.number, ended);
    }
    spoken
}

/// What is kept of each, when every row is final.
async fn all_final(app: &TestApp) -> BTreeMap<u32, Recorded> {
    let all = async || {
        let kept = recorded(app).await;
        (kept.len() == TRACKS as usize && kept.values().all(|track| track.ended)).then_some(kept)
    };
    app.eventually("every row is final", all).await
}

/// Those whose audio is not all there. Of these, what is there is what came first.
fn cut_short(spoken: &BTreeMap<u32, Spoken>, kept: &BTreeMap<u32, Recorded>) -> Vec<u32> {
    let whole = |number: &u32| {
        let (said, pcm) = (speech(*number, spoken[number].sent), &kept[number].pcm);
        assert!(said.starts_with(pcm), "p{number}: {} of {} bytes, and not the first", pcm.len(), said.len());
        said.len() == pcm.len() && spoken[number].close.close_frame
    };
    spoken.keys().copied().filter(|number| !whole(number)).collect()
}

/// Tracks that have more than one segment.
fn continued(kept: &BTreeMap<u32, Recorded>) -> usize {
    kept.values().filter(|track| track.rows.len() > 1).count()
}
