//! Whatever becomes of webhooks, what is known ends up as what LiveKit has.

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::time::Duration;

use livekit_api::services::room::RoomClient;

use super::autopilot;
use crate::support::fake_livekit::{FakeLiveKit, Verdict, camera, mic, person, screen_audio};
use crate::support::test_app::{API_KEY, API_SECRET, TestApp};

const ROOMS: [&str; 2] = ["standup", "retro"];
const PEOPLE: [&str; 3] = ["ana", "bo", "cy"];

/// SplitMix64.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) % sides as u64) as usize
    }

    fn pick<T: Clone>(&mut self, from: &[T]) -> Option<T> {
        (!from.is_empty()).then(|| from[self.roll(from.len())].clone())
    }
}

/// Rooms, participants, tracks, and for each that can be recorded one egress, as `room RM_1` and so on.
type State = BTreeSet<String>;

async fn truth(livekit: &FakeLiveKit) -> State {
    let client = RoomClient::with_api_key(&livekit.url(), API_KEY, API_SECRET).with_failover(false);
    let mut state = State::new();
    for room in client.list_rooms(Vec::new()).await.unwrap() {
        state.insert(format!("room {}", room.sid));
        for participant in client.list_participants(&room.name).await.unwrap() {
            if participant.identity.starts_with("EG_") {
                continue;
            }
            state.insert(format!("participant {} of {}", participant.sid, room.sid));
            for track in participant.tracks {
                state.insert(format!("track {} of {}", track.sid, room.sid));
                if !track.mime_type.starts_with("video/") {
                    state.insert(format!("egress of {}", track.sid));
                    state.insert(format!("{} streams", track.sid));
                }
            }
        }
    }
    state
}

async fn known(livekit: &FakeLiveKit, app: &TestApp) -> State {
    let mut state = State::new();
    for session in app.items("/api/v1/sessions?status=ACTIVE&limit=100").await {
        let sid = session["roomSid"].as_str().unwrap().to_owned();
        state.insert(format!("room {sid}"));
        let shown = app.get_json(&format!("/api/v1/sessions/{sid}")).await;
        for participant in shown["participants"].as_array().unwrap().iter().filter(|participant| participant["leftAt"].is_null()) {
            state.insert(format!("participant {} of {sid}", participant["sid"].as_str().unwrap()));
        }
        for track in app.items(&format!("/api/v1/sessions/{sid}/tracks?limit=100")).await {
            if track["unpublishedAt"].is_null() {
                state.insert(format!("track {} of {sid}", track["sid"].as_str().unwrap()));
            }
        }
    }
    for egress in app.items("/api/v1/egresses?limit=100").await {
        let is_open = ["QUEUED", "STARTING", "ACTIVE", "LOST"].contains(&egress["state"].as_str().unwrap());
        if is_open && !state.insert(format!("egress of {}", egress["trackSid"].as_str().unwrap())) {
            state.insert(format!("a second egress of {}", egress["trackSid"]));
        }
    }
    for track in app.items("/api/v1/tracks/live").await {
        let sid = track["trackSid"].as_str().unwrap();
        state.insert(format!("{sid} streams"));
        if livekit.active_for(sid).len() != 1 {
            state.insert(format!("{sid} has other egresses: {:?}", livekit.active_for(sid)));
        }
    }
    state
}

/// One thing that happens in a room.
async fn step(livekit: &FakeLiveKit, dice: &mut Dice, published: &mut Vec<(String, String, String)>) {
    let (room, identity) = (ROOMS[dice.roll(2)], PEOPLE[dice.roll(3)]);
    let forget = |published: &mut Vec<(String, String, String)>| published.retain(|(r, i, _)| (r.as_str(), i.as_str()) != (room, identity));
    match dice.roll(12) {
        0 | 1 => {
            forget(published); // an earlier one of this identity is sent out
            livekit.join(room, person(identity)).await;
        }
        2..=6 => {
            let track = [mic(), mic(), screen_audio(), camera()][dice.roll(4)].clone();
            let sid = livekit.publish(room, identity, track).await;
            published.push((room.to_owned(), identity.to_owned(), sid));
        }
        7 | 8 => {
            if let Some((_, _, sid)) = dice.pick(published) {
                livekit.unpublish(&sid).await;
                published.retain(|(_, _, known)| *known != sid);
            }
        }
        9 => {
            forget(published);
            livekit.leave(room, identity).await;
        }
        10 => {
            if let Some((room, identity, _)) = dice.pick(published) {
                published.retain(|(r, i, _)| (r, i) != (&room, &identity));
                for sid in livekit.rejoin(&room, &identity).await {
                    published.push((room.clone(), identity.clone(), sid));
                }
            }
        }
        _ => {
            livekit.start_room(room).await;
            livekit.finish_room(room).await;
            published.retain(|(r, _, _)| r != room);
        }
    }
}

async fn story(seed: u64) {
    println!("seed {seed}");
    let (livekit, app) = autopilot().await;
    livekit.tune(|knobs| knobs.subscription_timeout = Duration::from_millis(300));
    let (mut dice, fates) = (Dice(seed), Mutex::new(Dice(!seed)));
    livekit.filter_webhooks(move |_| match fates.lock().unwrap().roll(8) {
        0..=2 => Verdict::Deliver,
        3 | 4 => Verdict::Drop,
        5 => Verdict::DeliverTwice,
        _ => Verdict::HoldUntilReleased,
    });
    let mut published = Vec::new();
    for number in 0..30 {
        step(&livekit, &mut dice, &mut published).await;
        if number % 10 == 9 {
            livekit.webhooks_delivered().await;
        }
    }
    // What was held back is told late and out of order.
    livekit.release_webhooks();
    livekit.webhooks_delivered().await;
    livekit.lose_webhooks(true);
    let expected = truth(&livekit).await;
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    loop {
        let known = known(&livekit, &app).await;
        if known == expected {
            break;
        }
        let (missing, extra): (Vec<_>, Vec<_>) = (expected.difference(&known).collect(), known.difference(&expected).collect());
        assert!(std::time::Instant::now() < deadline, "seed {seed}: missing {missing:#?}\ntoo many {extra:#?}\nthe log:\n{}", app.log());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    super::looking::looks(&livekit, 3).await;
    assert_eq!(known(&livekit, &app).await, expected, "seed {seed}: and stays so");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_story_with_lost_repeated_and_late_webhooks_ends_as_livekit_has_it() {
    for seed in [1, 20_260_821, 0xC0FF_EE00_D15E_A5E5] {
        story(seed).await;
    }
}
