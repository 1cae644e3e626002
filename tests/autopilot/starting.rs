//! Every published track gets one egress.

use std::time::Duration;

use super::{autopilot, egresses, recorded, streamed, until};
use crate::support::fake_livekit::{Fault, Method, mic};
use crate::support::test_app::read_wav;

#[tokio::test]
async fn a_published_track_is_recorded_to_the_bit_with_nobodys_help() {
    let (livekit, app) = autopilot().await;
    let room = livekit.start_room("standup").await;
    let track = livekit.publish("standup", "ana", mic()).await;
    let egress = livekit.streaming(&track).await;
    let query = &egress.query;
    let said = ["roomName", "participant", "trackId", "meetingId", "sampleRate", "channels"].map(|name| query[name].as_str());
    assert_eq!(said, ["standup", "ana", &track, &room, "48000", "2"]);
    assert!(query.contains_key("ticket"));
    let shown = until(&app, &track, "ACTIVE").await;
    assert_eq!(shown.len(), 1);
    assert_eq!(
        (shown[0]["egressId"].as_str(), shown[0]["attempts"].as_i64(), shown[0]["node"].as_str()),
        (Some(&*egress.id), Some(1), Some("127.0.0.1"))
    );

    streamed(&livekit, &track, Duration::from_millis(500)).await;
    livekit.unpublish(&track).await;
    let recording = recorded(&app, 1).await;
    assert_eq!((recording["meetingId"].as_str(), recording["segments"][0]["endReason"].as_str()), (Some(&*room), Some("closed")));
    assert_eq!(read_wav(&app.wav_file()).1, livekit.sent_pcm(&track)[0].bytes());
    assert_eq!(until(&app, &track, "ENDED").await[0]["endReason"], "trackEnded");
    assert_eq!(livekit.calls(Method::StartTrackEgress), 1);
}

#[tokio::test]
async fn a_start_that_timed_out_but_runs_is_adopted_and_not_doubled() {
    let (livekit, app) = {
        let livekit = crate::support::fake_livekit::FakeLiveKit::start().await;
        let app = super::builder(&livekit).env("LIVE_MEETING__LIVEKIT__REQUEST_TIMEOUT", "1s").start().await;
        livekit.deliver_to(app.addr);
        (livekit, app)
    };
    livekit.tune(|knobs| knobs.dial_delay = Duration::from_secs(3));
    livekit.fail_next(Method::StartTrackEgress, Fault::HangButRun, 1);
    let track = livekit.publish("standup", "ana", mic()).await;
    let egress = livekit.streaming(&track).await;
    let shown = until(&app, &track, "ACTIVE").await;
    assert_eq!((shown.len(), shown[0]["egressId"].as_str()), (1, Some(&*egress.id)));
    assert_eq!((livekit.calls(Method::StartTrackEgress), livekit.egresses().len()), (1, 1));
    assert_eq!(egresses(&app, &track).await.len(), 1);
}
