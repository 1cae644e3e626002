//! Writes that the kernel interrupts, and those of which it takes only a part: callers go on with the rest.

use super::{all_recorded, connect, eager, files, pcm, recording};
use crate::support::egress_peer::counter_pcm;
use crate::support::faults::{Strace, frames_for_players};

const FRAME: usize = 4;

/// What comes of audio while every other write to its file ends so: what is in the file, and how often a write was spoiled at least.
async fn recorded_under(fault: &str) -> Option<(Vec<u8>, Vec<u8>)> {
    let app = eager().start().await;
    let sent = counter_pcm(48_000 * 3, 1);
    let mut peer = connect(&app, "ana").await;
    let (first, rest) = sent.split_at(38_400);
    peer.send_pcm(first).await.unwrap();
    all_recorded(&app, "ana").await;
    let faulty = Strace::inject(&app, None, &format!("{fault}:when=1+2"), Some(&app.wav_file()))?;
    for part in rest.chunks(57_600) {
        peer.send_pcm(part).await.unwrap();
        all_recorded(&app, "ana").await;
    }
    drop(faulty);
    peer.close_and_wait().await;
    let recording = recording(&app, "ana").await;
    let files = files(&app, &recording);
    assert_eq!((files.len(), recording["segments"][0]["endReason"].as_str()), (1, Some("closed")), "{recording}");
    assert!(frames_for_players(&files[0]).iter().all(|(_, frames)| *frames as usize * FRAME == sent.len()), "{recording}");
    Some((sent, pcm(&files)))
}

#[tokio::test]
async fn d1_a_write_that_is_interrupted_is_made_again() {
    let Some((sent, recorded)) = recorded_under("error=EINTR").await else { return };
    assert!(recorded == sent);
}

#[tokio::test]
async fn d1_a_write_of_which_only_a_part_is_taken_goes_on_behind_it() {
    // The kernel does nothing at all, and says that it has taken a frame's length: that frame is missing, and the next one is in its place.
    let Some((sent, recorded)) = recorded_under("retval=4").await else { return };
    assert_eq!(recorded.len(), sent.len());
    let frames = |pcm: &[u8]| pcm.chunks_exact(FRAME).map(<[u8]>::to_vec).collect::<Vec<_>>();
    let differing: Vec<usize> =
        frames(&sent).iter().zip(&frames(&recorded)).enumerate().filter(|(_, (sent, found))| sent != found).map(|(at, _)| at).collect();
    assert!(!differing.is_empty() && differing.iter().all(|at| recorded[at * FRAME..][..FRAME] == [0; FRAME]), "{differing:?}");
    assert!(differing.windows(2).all(|pair| pair[1] - pair[0] > 1_000), "one frame of a write: {differing:?}");
}
