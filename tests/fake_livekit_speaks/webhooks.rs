//! Webhooks as LiveKit makes, signs, queues and repeats them.

use std::collections::BTreeSet;
use std::time::Duration;

use live_meeting::livekit::webhook::WebhookVerifier;
use serde_json::Value;

use super::ear::Door;
use crate::support::fake_livekit::{FakeLiveKit, Fate, Verdict, mic, person};
use crate::support::test_app::{API_KEY, API_SECRET};

async fn with_door(statuses: &[u16]) -> (FakeLiveKit, Door) {
    let (livekit, door) = (FakeLiveKit::start().await, Door::start(statuses).await);
    livekit.deliver_to(door.addr);
    (livekit, door)
}

fn fates(livekit: &FakeLiveKit) -> Vec<Fate> {
    livekit.deliveries().into_iter().map(|delivery| delivery.fate).collect()
}

/// Every path of keys in a message, without the contents of lists.
fn keys(value: &Value, path: &str) -> BTreeSet<String> {
    let members = value.as_object().into_iter().flatten();
    members.flat_map(|(key, value)| keys(value, &format!("{path}.{key}")).into_iter().chain([format!("{path}.{key}")])).collect()
}

#[tokio::test]
async fn a_meeting_sends_what_the_captured_one_sent() {
    let (livekit, door) = with_door(&[204]).await;
    livekit.start_room("standup").await;
    livekit.join("standup", person("ana").name("Ana")).await;
    let track = livekit.publish("standup", "ana", mic()).await;
    livekit.unpublish(&track).await;
    livekit.leave("standup", "ana").await;
    livekit.finish_room("standup").await;
    livekit.webhooks_delivered().await;

    let captured: Vec<Value> = include_str!("../fixtures/livekit-1.13.5.jsonl").lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let knocks = door.knocks();
    assert_eq!(knocks.len(), captured.len());
    let verifier = WebhookVerifier::new([(API_KEY, API_SECRET)]);
    for (knock, captured) in knocks.iter().zip(&captured) {
        let body = knock.json();
        assert_eq!(body["event"], captured["event"]);
        assert_eq!(keys(&body, ""), keys(captured, ""), "{body}");
        assert!(body["createdAt"].is_string() && body["id"].as_str().unwrap().starts_with("EV_"), "{body}");
        for place in ["/track/source", "/track/mimeType", "/participant/state", "/participant/disconnectReason", "/participant/version"] {
            assert_eq!(body.pointer(place), captured.pointer(place), "{place} of {body}");
        }
        assert_eq!(verifier.verify(knock.header("Authorization"), &knock.body), Ok(()));
        assert_eq!((knock.header("Content-Type"), knock.header("User-Agent")), (Some("application/webhook+json"), Some("LiveKit")));
        assert!(knock.head.starts_with("POST /livekit/webhook HTTP/1.1"));
    }
    assert_eq!(fates(&livekit), [Fate::Answered(204); 6]);
}

#[tokio::test]
async fn what_may_pass_is_repeated_with_the_same_body_and_token() {
    let (livekit, door) = with_door(&[503, 0, 429, 500, 200]).await;
    livekit.start_room("a").await;
    livekit.webhooks_delivered().await;
    let knocks = door.knocks();
    assert_eq!(knocks.len(), 5);
    assert!(knocks.iter().all(|knock| (&knock.head, &knock.body) == (&knocks[0].head, &knocks[0].body)));
    let delivery = &livekit.deliveries()[0];
    assert_eq!(delivery.answers, [Some(503), None, Some(429), Some(500), Some(200)]);
    assert_eq!((delivery.fate, delivery.json()), (Fate::Answered(200), knocks[0].json()));
}

#[tokio::test]
async fn five_failures_lose_a_webhook_and_any_other_answer_ends_it_at_once() {
    let (livekit, door) = with_door(&[500, 500, 500, 500, 500, 400, 501, 302, 200]).await;
    livekit.start_room("a").await;
    livekit.join("a", person("ana")).await;
    livekit.join("a", person("bo")).await;
    livekit.join("a", person("cy")).await;
    livekit.join("a", person("di")).await;
    livekit.webhooks_delivered().await;
    assert_eq!(fates(&livekit), [Fate::GaveUp, Fate::Answered(400), Fate::Answered(501), Fate::Answered(302), Fate::Answered(200)]);
    assert_eq!(door.knocks().len(), 9);
}

#[tokio::test]
async fn rooms_wait_for_themselves_alone_and_too_many_or_too_old_is_too_late() {
    let (livekit, door) = with_door(&[200]).await;
    livekit.webhook_limits(Duration::from_millis(1), Duration::from_secs(30), 3);
    door.open(false);
    livekit.start_room("slow").await;
    livekit.eventually("the first at the door", |_| (!door.knocks().is_empty()).then_some(())).await;
    for identity in ["ana", "bo", "cy", "di"] {
        livekit.join("slow", person(identity)).await;
    }
    livekit.start_room("quick").await;
    livekit.eventually("the other room's at its end", |livekit| (livekit.deliveries()[5].fate == Fate::Answered(200)).then_some(())).await;
    assert_eq!(fates(&livekit)[..5], [Fate::Waiting, Fate::Waiting, Fate::Waiting, Fate::Waiting, Fate::Overflow]);
    livekit.webhook_limits(Duration::from_millis(1), Duration::ZERO, 3);
    door.open(true);
    livekit.webhooks_delivered().await;
    assert_eq!(fates(&livekit)[..4], [Fate::Answered(200), Fate::TooOld, Fate::TooOld, Fate::TooOld]);
    assert_eq!(door.events(), ["room_started", "room_started"]);
}

#[tokio::test]
async fn a_test_may_lose_double_and_hold_back() {
    let (livekit, door) = with_door(&[200]).await;
    livekit.lose_webhooks(true);
    livekit.start_room("a").await;
    livekit.lose_webhooks(false);
    livekit.lose_next(1);
    livekit.join("a", person("ana")).await;
    livekit.duplicate(true);
    let track = livekit.publish("a", "ana", mic()).await;
    livekit.duplicate(false);
    livekit.filter_webhooks(|event| match event {
        "track_unpublished" => Verdict::HoldUntilReleased,
        "participant_left" => Verdict::DeliverTwice,
        _ => Verdict::Drop,
    });
    livekit.unpublish(&track).await;
    livekit.leave("a", "ana").await;
    livekit.join("a", person("bo")).await;
    livekit.webhooks_delivered().await;
    livekit.release_webhooks();
    livekit.webhooks_delivered().await;
    livekit.finish_room("a").await;
    livekit.webhooks_delivered().await;
    let expected =
        ["track_published", "track_published", "participant_left", "participant_left", "track_unpublished", "participant_left", "room_finished"];
    assert_eq!(door.events(), expected);
    let published = livekit.deliveries_of("track_published");
    assert_eq!((published.len(), &published[0].event.id), (2, &published[1].event.id), "a repetition has the same id");
    assert_eq!(livekit.deliveries_of("room_started")[0].fate, Fate::Dropped);
}
