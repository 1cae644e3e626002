//! What a real LiveKit tells becomes sessions, participants, tracks and recordings.

use std::time::Duration;

use diesel::prelude::*;
use diesel::sql_types::Text;
use serde_json::Value;

use super::real_livekit::{ANA, Guest, Speaker};
use super::{Venue, installed};
use crate::support::fake_livekit::Method;
use crate::support::test_app::{TestApp, read_wav};

/// All is known from webhooks, or nothing is.
const HARDLY_LOOKS: (&str, &str) = ("LIVE_MEETING__LIVEKIT__RECONCILE_INTERVAL", "10m");
const LOOKS_OFTEN: (&str, &str) = ("LIVE_MEETING__LIVEKIT__RECONCILE_INTERVAL", "2s");

#[derive(QueryableByName, Debug, PartialEq)]
struct Told {
    #[diesel(sql_type = Text)]
    metadata: String,
    #[diesel(sql_type = Text)]
    attributes: String,
    #[diesel(sql_type = Text)]
    role: String,
}

#[derive(QueryableByName)]
struct Step {
    #[diesel(sql_type = Text)]
    step: String,
    #[diesel(sql_type = Text)]
    cause: String,
}

impl Venue {
    /// The only session, in this state.
    async fn session(&self, status: &str) -> Value {
        self.app
            .eventually(&format!("one session that is {status}"), async || {
                let sessions = self.app.items("/api/v1/sessions").await;
                assert!(sessions.len() <= 1, "{sessions:?}");
                let session = sessions.into_iter().find(|session| session["status"] == status)?;
                Some(self.app.get_json(&format!("/api/v1/sessions/{}", session["meetingId"].as_str()?)).await)
            })
            .await
    }

    async fn tracks(&self) -> Vec<Value> {
        let session = &self.app.items("/api/v1/sessions").await[0];
        self.app.items(&format!("/api/v1/sessions/{}/tracks", session["meetingId"].as_str().unwrap())).await
    }

    /// Waits until Ana and her track are known as she and it are, and the track is recorded.
    async fn ana_is_heard(&self, sid: &str, track: &str) {
        let session = self.session("ACTIVE").await;
        assert_eq!(session["roomName"], "standup");
        assert!(session["meetingId"].as_str().unwrap().starts_with("RM_"), "{session}");
        self.streamed(track, Duration::from_secs(1)).await;
        let egress = self.egress_that_is(track, "ACTIVE").await;
        assert_eq!((egress["attempts"].as_i64(), egress["participant"].as_str()), (Some(1), Some("ana")));

        let session = self.session("ACTIVE").await;
        let here: Vec<&Value> = session["participants"].as_array().unwrap().iter().filter(|participant| participant["leftAt"].is_null()).collect();
        assert_eq!(here.len(), 1, "{session}");
        let said = ["sid", "identity", "name", "kind"].map(|key| here[0][key].as_str().unwrap());
        assert_eq!(said, [sid, "ana", ANA.name, "STANDARD"]);
        assert!(here[0]["joinedAt"].is_string(), "{session}");
        let told: Told = diesel::sql_query("SELECT metadata, attributes, role FROM participants WHERE sid = ?")
            .bind::<Text, _>(sid)
            .get_result(&mut self.app.database())
            .unwrap();
        let attributes = format!(r#"{{"{}":"{}"}}"#, ANA.attribute.0, ANA.attribute.1);
        assert_eq!(told, Told { metadata: ANA.metadata.to_owned(), attributes, role: "host".to_owned() });

        let tracks = self.tracks().await;
        let published: Vec<&Value> = tracks.iter().filter(|track| track["unpublishedAt"].is_null()).collect();
        assert_eq!(published.len(), 1, "{tracks:?}");
        let said = ["sid", "participant", "kind", "source", "name", "mimeType"].map(|key| published[0][key].as_str().unwrap());
        assert_eq!(said, [track, "ana", "AUDIO", "MICROPHONE", "mic", "audio/red"]);
    }

    async fn streamed(&self, track: &str, audio: Duration) {
        self.egress.streaming(track).await;
        self.egress.eventually("audio is streamed", |egress| (egress.sent_pcm(track).first()?.duration() >= audio).then_some(())).await;
    }

    /// A client leaves, and once that is known its egress ends, as LiveKit's does with its track.
    async fn sees_off(&self, speaker: Speaker) {
        let track = speaker.track.clone();
        speaker.leave().await;
        self.all_have_left().await;
        self.egress.close_egress(&track).await;
    }

    /// The only egress of a track, once it is in a state.
    async fn egress_that_is(&self, track: &str, state: &str) -> Value {
        self.app
            .eventually(&format!("an egress that is {state}"), async || {
                let mut egresses = self.app.items(&format!("/api/v1/egresses?trackSid={track}")).await;
                assert!(egresses.len() <= 1, "{egresses:?}");
                egresses.pop().filter(|egress| egress["state"] == state)
            })
            .await
    }

    /// Waits until nobody is in the room and nothing is published, each with its time.
    async fn all_have_left(&self) {
        let ended = |items: &[Value], key: &str| !items.is_empty() && items.iter().all(|item| item[key].is_string());
        self.app
            .eventually("everybody's leaving", async || {
                let session = &self.app.items("/api/v1/sessions").await[0];
                let session = self.app.get_json(&format!("/api/v1/sessions/{}", session["meetingId"].as_str()?)).await;
                let left = ended(session["participants"].as_array()?, "leftAt") && ended(&self.tracks().await, "unpublishedAt");
                left.then_some(())
            })
            .await;
    }

    /// The only recording, once it has ended, with so many segments.
    async fn recorded(&self, segments: usize) -> Value {
        self.app
            .eventually("the recording's end", async || {
                let mut recordings = self.app.items("/api/v1/recordings").await;
                assert!(recordings.len() <= 1, "{recordings:?}");
                let recording = recordings.pop()?;
                (recording["endedAt"].is_string() && recording["segments"].as_array()?.len() == segments).then_some(recording)
            })
            .await
    }

    /// Waits until each of these tracks' egresses is over for such a reason, and asserts that it was the only one, and that the files hold what they sent.
    async fn recorded_to_the_bit(&self, tracks: &[&str], reasons: &[&str]) -> Value {
        let recording = self.recorded(tracks.len()).await;
        assert!(recording["segments"].as_array().unwrap().iter().all(|segment| segment["endReason"] == "closed"), "{recording}");
        let files = self.app.wav_files();
        assert_eq!(files.len(), tracks.len(), "{files:?}");
        for (file, track) in files.iter().zip(tracks) {
            let sent = self.egress.sent_pcm(track);
            assert_eq!(sent.len(), 1, "one egress of {track}");
            assert!(read_wav(file).1 == sent[0].bytes(), "{} differs from what was sent for {track}", file.display());
            let shown = self.egress_that_is(track, "ENDED").await;
            assert!(reasons.contains(&shown["endReason"].as_str().unwrap()), "{shown}");
        }
        assert_eq!(self.egress.calls(Method::StartTrackEgress), tracks.len());
        recording
    }

    /// The events that LiveKit told, once it has told the last of them and each was answered 204.
    async fn told(&self, last: &str) -> Vec<Value> {
        let all = || self.proxy.webhooks();
        self.app.eventually(last, async || all().iter().any(|(event, _)| event["event"] == last).then_some(())).await;
        assert!(all().iter().all(|(_, status)| *status == 204), "{:?}", all());
        all().into_iter().map(|(event, _)| event).collect()
    }
}

/// The steps of everything, as `started webhook`, in the order they were recorded.
fn steps(app: &TestApp) -> Vec<String> {
    let steps: Vec<Step> = diesel::sql_query("SELECT step, cause FROM transitions ORDER BY id").load(&mut app.database()).unwrap();
    steps.into_iter().map(|Step { step, cause }| format!("{step} {cause}")).collect()
}

#[tokio::test]
async fn a_meeting_is_known_by_its_webhooks_and_its_track_recorded_to_the_bit() {
    let Some(installed) = installed() else { return };
    let venue = Venue::open(&installed, &[HARDLY_LOOKS]).await;
    venue.believe_webhooks();
    let ana = venue.livekit.join("standup", ANA).await;
    let (sid, track) = (ana.sid.clone(), ana.track.clone());
    venue.ana_is_heard(&sid, &track).await;
    venue.sees_off(ana).await;
    venue.recorded_to_the_bit(&[&track], &["trackEnded"]).await;

    venue.livekit.rooms().delete_room("standup").await.unwrap();
    let session = venue.session("ENDED").await;
    let events = venue.told("room_finished").await;
    let names: Vec<&str> = events.iter().map(|event| event["event"].as_str().unwrap()).collect();
    let expected = ["room_started", "participant_joined", "track_published", "track_unpublished", "participant_left", "room_finished"];
    assert_eq!(names, expected);
    assert!(events.iter().all(|event| event["room"]["sid"] == session["roomSid"]), "{events:?}");
    let expected = ["started", "joined", "published", "unpublished", "left", "ended"].map(|step| format!("{step} webhook"));
    assert_eq!(steps(&venue.app), expected);
}

#[tokio::test]
async fn a_meeting_whose_every_webhook_was_refused_is_found_by_looking() {
    let Some(installed) = installed() else { return };
    let venue = Venue::open(&installed, &[LOOKS_OFTEN]).await;
    let ana = venue.livekit.join("standup", ANA).await;
    let (sid, track) = (ana.sid.clone(), ana.track.clone());
    venue.ana_is_heard(&sid, &track).await;
    ana.leave().await;
    let lists_nobody = async || venue.livekit.rooms().list_participants("standup").await.unwrap().is_empty().then_some(());
    venue.app.eventually("an empty room", lists_nobody).await;
    // Nobody has told that she left: the server has to ask before it replaces the egress.
    venue.egress.close_egress(&track).await;
    venue.recorded_to_the_bit(&[&track], &["gone", "trackEnded"]).await;
    venue.all_have_left().await;

    venue.livekit.rooms().delete_room("standup").await.unwrap();
    venue.session("ENDED").await;
    let mut steps = steps(&venue.app);
    steps.sort();
    let expected = ["ended", "joined", "left", "published", "started", "unpublished"].map(|step| format!("{step} reconciler"));
    assert_eq!(steps, expected);
    let told = venue.proxy.webhooks();
    assert!(!told.is_empty() && told.iter().all(|(_, status)| *status == 500), "{told:?}");
    for asked in ["RoomService/ListRooms", "RoomService/ListParticipants"] {
        assert!(venue.proxy.calls(asked).iter().any(|call| call.answer.status == 200 && !call.answer.body.is_empty()), "{asked}");
    }
}

#[tokio::test]
async fn who_comes_again_under_new_sids_goes_on_in_the_same_recording() {
    let Some(installed) = installed() else { return };
    let venue = Venue::open(&installed, &[HARDLY_LOOKS]).await;
    venue.believe_webhooks();
    let first = venue.livekit.join("standup", ANA).await;
    let (first_sid, first_track) = (first.sid.clone(), first.track.clone());
    venue.ana_is_heard(&first_sid, &first_track).await;
    venue.sees_off(first).await;

    let again = venue.livekit.join("standup", ANA).await;
    let (sid, track) = (again.sid.clone(), again.track.clone());
    assert!(sid != first_sid && track != first_track);
    venue.ana_is_heard(&sid, &track).await;
    venue.sees_off(again).await;
    let recording = venue.recorded_to_the_bit(&[&first_track, &track], &["trackEnded"]).await;
    let segments = recording["segments"].as_array().unwrap();
    let (end, start) = (segments[0]["endMs"].as_i64().unwrap(), segments[1]["startMs"].as_i64().unwrap());
    assert!(end < start, "the time in between is in the recording: {recording}");
    assert_eq!(venue.session("ACTIVE").await["participants"].as_array().unwrap().len(), 2);
}

#[tokio::test]
async fn an_encrypted_track_is_known_and_left_alone() {
    let Some(installed) = installed() else { return };
    let venue = Venue::open(&installed, &[HARDLY_LOOKS]).await;
    venue.believe_webhooks();
    let bruno = venue.livekit.join("standup", Guest { identity: "bruno", speech: "bruno.wav", encrypted: true, ..ANA }).await;
    let shown = venue.egress_that_is(&bruno.track, "SKIPPED").await;
    assert_eq!((shown["endReason"].as_str(), shown["attempts"].as_i64()), (Some("encrypted"), Some(0)));
    let events = venue.told("track_published").await;
    let published = events.iter().find(|event| event["event"] == "track_published").unwrap();
    assert_eq!((published["track"]["encryption"].as_str(), published["track"]["mimeType"].as_str()), (Some("GCM"), Some("audio/opus")));
    bruno.leave().await;
    venue.all_have_left().await;
    assert_eq!(venue.egress.calls(Method::StartTrackEgress), 0);
}
