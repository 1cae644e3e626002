//! Senders that speak in real time, cheaply enough for hundreds of them: 8 kHz stereo in messages of 100 ms.

use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::egress_peer::{CloseSeen, EgressPeer, counter_pcm};
use super::test_app::{TestApp, sidecar};

/// Of one message.
pub const MESSAGE_FRAMES: usize = 800;
const MESSAGE_TIME: Duration = Duration::from_millis(100);

/// What a speaker knows when it has ended.
#[derive(Debug)]
pub struct Spoken {
    pub number: u32,
    /// Bytes that it has sent, or begun to.
    pub sent: usize,
    pub close: CloseSeen,
}

/// Begins to speak as participant `p<number>`, for so many messages or until the server ends it.
pub async fn speak(app: &TestApp, number: u32, messages: usize) -> JoinHandle<Spoken> {
    let path = format!("/egress-audio?roomName=room&participant=p{number:03}&trackId=TR_{number}&sampleRate=8000&channels=2");
    let mut peer = EgressPeer::connect(app.addr, &path).await.unwrap_or_else(|refusal| panic!("p{number}: {refusal:?}"));
    tokio::spawn(async move {
        let mut due = Instant::now();
        let mut sent = 0;
        for message in 0..messages {
            tokio::time::sleep_until(due).await;
            due += MESSAGE_TIME;
            let frames = counter_pcm(MESSAGE_FRAMES, seed(number).wrapping_add((message * MESSAGE_FRAMES) as u32));
            sent += frames.len();
            // It takes in what has come before it writes: who writes on into a closed connection loses the Close to a reset.
            let ended = peer.send_realtime(&frames).await.is_err();
            if ended {
                return Spoken { number, sent, close: peer.expect_close().await };
            }
        }
        Spoken { number, sent, close: peer.close_and_wait().await }
    })
}

fn seed(number: u32) -> u32 {
    number.wrapping_mul(10_000_019).wrapping_add(1)
}

/// The audio that participant `p<number>` says in so many bytes.
pub fn speech(number: u32, bytes: usize) -> Vec<u8> {
    counter_pcm(bytes / 4, seed(number))
}

/// A participant's segments as their rows say, in order, and their audio in one.
pub struct Recorded {
    pub rows: Vec<serde_json::Value>,
    pub pcm: Vec<u8>,
    pub ended: bool,
}

/// What is kept of each participant, by number.
pub async fn recorded(app: &TestApp) -> std::collections::BTreeMap<u32, Recorded> {
    let (mut all, mut cursor) = (std::collections::BTreeMap::new(), String::new());
    loop {
        let page = app.get_json(&format!("/api/v1/recordings?limit=100{cursor}")).await;
        for item in page["items"].as_array().unwrap() {
            let number = item["participant"].as_str().unwrap()[1..].parse().unwrap();
            let rows = item["segments"].as_array().unwrap().clone();
            let pcm = rows.iter().flat_map(|row| pcm_of(&app.audio_dir().join(row["path"].as_str().unwrap()))).collect();
            let ended = item["endedAt"].is_string() && rows.iter().all(|row| row["endedAt"].is_string());
            assert!(all.insert(number, Recorded { rows, pcm, ended }).is_none(), "one recording for each connection: {item}");
        }
        match page["nextCursor"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => return all,
        }
    }
}

/// What a WAV file of ours declares: hundreds of them, sample by sample, would take minutes. The silence that its sidecar says was put in for a sender
/// that was late is left out: on a machine with other work, who speaks for hundreds is.
fn pcm_of(path: &std::path::Path) -> Vec<u8> {
    let mut file = std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let declared = u32::from_le_bytes(file[40..44].try_into().unwrap()) as usize;
    assert!(file.len() >= 44 + declared, "{} declares more than it holds", path.display());
    file.truncate(44 + declared);
    let mut pcm = file.split_off(44);
    let sidecar = sidecar(path).unwrap_or_default();
    for gap in sidecar["gaps"].as_array().into_iter().flatten().rev().filter(|gap| gap["reason"] == "missing") {
        let [start, frames] = ["startFrame", "frames"].map(|field| gap[field].as_u64().expect("frames") as usize);
        pcm.drain(4 * start..4 * (start + frames));
    }
    pcm
}
