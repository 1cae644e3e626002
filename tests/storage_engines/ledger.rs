//! The ledger of webhooks, and the steps that are written with what they tell.

use chrono::TimeDelta;
use futures_util::future::join_all;
use live_meeting::db::rows::Page;
use live_meeting::db::rows::events::{Applied, Arrival, EventFilter, Outcome, StoredBody, TransitionRow};
use live_meeting::db::{DbError, Store};
use live_meeting::ids::{EventId, MeetingId, RoomName};
use live_meeting::session::event::{EventKind, SessionEvent};

use super::engine::{TestDatabase, on_postgres};
use super::fixtures::{ALL, arrival, at, at_ms, body, deliver, ended, event, participant, started, track};

async fn outcome(store: &Store, id: &EventId) -> (i32, String, Option<String>) {
    let row = store.webhook_event(id.clone()).await.unwrap().expect("it is in the ledger");
    (row.attempts, row.outcome, row.problem)
}

async fn steps(store: &Store, meeting: &str) -> Vec<TransitionRow> {
    let session = store.session(MeetingId::new(meeting)).await.unwrap().expect("a session");
    store.transitions(session.id, ALL).await.unwrap()
}

fn joined(room_sid: &str, sid: &str, second: i64) -> SessionEvent {
    event(room_sid, &format!("room of {room_sid}"), second, EventKind::ParticipantJoined(participant(sid, "Ana")))
}

pub async fn every_repetition_is_counted_and_what_came_of_the_first_stays(db: &TestDatabase) {
    let store = db.store().await;
    let applied = started("RM_1", "room", 0);
    let roomless = SessionEvent { room: None, ..event("", "", 0, EventKind::Other) };
    let strange = SessionEvent { room: None, ..event("", "", 0, EventKind::Other) };
    let not_understood = Arrival { event: strange.clone(), body: StoredBody { understood: false, ..body() } };
    for count in 1..=3 {
        let repeated = count > 1;
        for arrival in [arrival(applied.clone()), arrival(roomless.clone()), not_understood.clone()] {
            assert_eq!(store.apply_event(arrival).await.unwrap() == Applied::Repeated, repeated);
        }
        for (event, word) in [(&applied, "applied"), (&roomless, "noRoom"), (&strange, "notUnderstood")] {
            assert_eq!(outcome(&store, &event.id).await, (count, word.to_owned(), None));
        }
    }
    join_all((0..20).map(|_| deliver(&store, applied.clone()))).await;
    assert_eq!(outcome(&store, &applied.id).await.0, 23, "none is missed when they come together");
    assert_eq!(steps(&store, "RM_1").await.len(), 1);
}

pub async fn events_of_many_rooms_at_the_same_time_are_each_applied_once_and_in_their_rooms_order(db: &TestDatabase) {
    const ROOMS: usize = 24;
    const EVENTS: usize = 15;
    let store = db.store().await;
    // More than go into one transaction; all of a room are said to have happened at the same time, so that only their order tells them apart.
    let told = (0..EVENTS).flat_map(|number| (0..ROOMS).map(move |room| joined(&format!("RM_{room}"), &format!("PA_{number:02}"), 0)));
    let answers = join_all(told.map(|event| store.apply_event(arrival(event)))).await;
    assert_eq!(answers.len(), ROOMS * EVENTS);
    for answer in answers {
        assert!(matches!(answer, Ok(Applied::Kept(Some(_)))), "{answer:?}");
    }
    assert_eq!(db.count("webhook_events WHERE attempts = 1 AND outcome = 'applied'").await, ROOMS * EVENTS);
    for room in 0..ROOMS {
        let steps = steps(&store, &format!("RM_{room}")).await;
        assert_eq!((steps[0].step.as_str(), &steps[0].subject), ("started", &None));
        let subjects: Vec<String> = steps[1..].iter().map(|step| step.subject.clone().expect("a participant")).collect();
        assert_eq!(subjects, (0..EVENTS).map(|number| format!("PA_{number:02}")).collect::<Vec<_>>(), "room {room}");
    }
}

/// On PostgreSQL, whose transactions end for reasons of their own.
#[actix_rt::test]
async fn w6_an_event_that_the_database_did_not_take_is_not_overtaken_by_what_follows_it() {
    const REFUSE_ONCE: &str = "CREATE SEQUENCE asked;
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            IF nextval('asked') = 1 THEN RAISE EXCEPTION 'ended by a test' USING ERRCODE = '40P01'; END IF;
            RETURN NULL;
        END $$;
        CREATE TRIGGER refuse AFTER INSERT ON webhook_events FOR EACH STATEMENT EXECUTE FUNCTION refuse();";
    on_postgres(async |db| {
        let store = db.store().await;
        db.execute(REFUSE_ONCE).await.unwrap();
        // More than go into one transaction, of which the first is refused.
        let told: Vec<Arrival> = (0..100).map(|number| arrival(joined("RM_1", &format!("PA_{number:02}"), 0))).collect();
        let answers = store.apply_in_order(told.clone()).await;
        assert!(answers.iter().all(|answer| answer.as_ref().is_err_and(DbError::is_retryable)), "{answers:?}");
        assert_eq!(db.count("webhook_events").await, 0);
        for answer in store.apply_in_order(told).await {
            assert!(matches!(answer, Ok(Applied::Kept(Some(_)))), "{answer:?}");
        }
        let subjects: Vec<String> = steps(&store, "RM_1").await.into_iter().filter_map(|step| step.subject).collect();
        assert_eq!(subjects, (0..100).map(|number| format!("PA_{number:02}")).collect::<Vec<_>>());
    })
    .await;
}

pub async fn an_event_that_cannot_be_applied_is_kept_as_failed_and_takes_no_other_with_it(db: &TestDatabase) {
    let store = db.store().await;
    // What PostgreSQL's indices refuse, or a constraint of a later version: the database takes everything but what one event says.
    db.execute("ALTER TABLE participants ADD COLUMN trap TEXT CHECK (sid <> 'PA_13' OR trap IS NOT NULL)").await.unwrap();
    let events: Vec<SessionEvent> = (0..30).map(|number| joined(&format!("RM_{number}"), &format!("PA_{number}"), 0)).collect();
    let answers = join_all(events.iter().map(|event| store.apply_event(arrival(event.clone())))).await;
    let poison = events[13].clone();
    for (event, answer) in events.iter().zip(answers) {
        let answer = answer.expect("each is kept");
        if event.id == poison.id {
            let Applied::Failed(problem) = answer else { panic!("{answer:?}") };
            assert_eq!(outcome(&store, &poison.id).await, (1, "failed".to_owned(), Some(problem)));
        } else {
            assert!(matches!(answer, Applied::Kept(Some(_))), "{answer:?}");
            assert_eq!(outcome(&store, &event.id).await, (1, "applied".to_owned(), None));
        }
    }
    let problem = outcome(&store, &poison.id).await.2.unwrap();
    assert!(problem.to_lowercase().contains("check constraint"), "{problem}");
    // The room's start is said by the same event, and was written before the participant was refused.
    assert_eq!((db.count("sessions").await, db.count("transitions").await), (29, 2 * 29));
    assert_eq!(store.session(MeetingId::new("RM_13")).await.unwrap(), None);
    assert_eq!(deliver(&store, poison.clone()).await, Applied::Repeated);

    store.replay_event(poison.clone(), at(5)).await.expect_err("the cause is still there");
    assert_eq!(outcome(&store, &poison.id).await.1, "failed");
    db.execute("ALTER TABLE participants DROP COLUMN trap").await.unwrap();
    let replayed = store.replay_event(poison.clone(), at(5)).await.unwrap().expect("a session");
    assert_eq!(replayed.meeting_id, "RM_13");
    assert_eq!(outcome(&store, &poison.id).await, (3, "applied".to_owned(), None));
    assert_eq!(store.participants(replayed.id).await.unwrap()[0].sid, "PA_13");
    let steps = steps(&store, "RM_13").await;
    assert_eq!(
        steps.iter().map(|step| (step.step.as_str(), step.cause.as_str())).collect::<Vec<_>>(),
        [("started", "operator"), ("joined", "operator")]
    );
}

pub async fn each_step_is_written_once_with_the_event_that_caused_it(db: &TestDatabase) {
    let store = db.store().await;
    let ana = || participant("PA_1", "Ana");
    let story = [
        (event("RM_1", "room", 0, EventKind::Other), &[(None, "started", 0)][..]),
        (started("RM_1", "room", 1), &[]),
        (event("RM_1", "room", 2, EventKind::ParticipantJoined(ana())), &[(Some("PA_1"), "joined", 2)]),
        (event("RM_1", "room", 3, EventKind::ParticipantJoined(ana())), &[]),
        (event("RM_1", "room", 4, EventKind::TrackPublished(participant("PA_1", ""), track("TR_1", "mic"))), &[(Some("TR_1"), "published", 4)]),
        (event("RM_1", "room", 5, EventKind::TrackUnpublished(participant("PA_1", ""), track("TR_1", "mic"))), &[(Some("TR_1"), "unpublished", 5)]),
        (event("RM_1", "room", 6, EventKind::ParticipantLeft(ana())), &[(Some("PA_1"), "left", 6)]),
        (ended("RM_1", "room", 7), &[(None, "ended", 7)]),
        (ended("RM_1", "room", 8), &[]),
    ];
    for (event, _) in story.iter().chain(&story) {
        deliver(&store, event.clone()).await;
    }
    let expected = story.iter().flat_map(|(event, steps)| {
        steps.iter().map(|(subject, step, second)| {
            (subject.map(str::to_owned), (*step).to_owned(), at(*second).naive_utc(), "webhook".to_owned(), Some(event.id.as_str().to_owned()))
        })
    });
    let told: Vec<_> = steps(&store, "RM_1").await.into_iter().map(|row| (row.subject, row.step, row.at, row.cause, row.event_id)).collect();
    assert_eq!(told, expected.collect::<Vec<_>>());
}

pub async fn what_the_application_says_of_rooms_and_people_stands_on_their_rows(db: &TestDatabase) {
    let store = db.store().await;
    let whole = |second: i64, metadata: &str, kind| {
        let mut event = event("RM_1", "room", second, kind);
        let room = event.room.as_mut().unwrap();
        (room.created_at, room.metadata) = (Some(at(0)), Some(metadata.to_owned()));
        event
    };
    let mut ana = participant("PA_1", "Ana");
    (ana.role, ana.metadata, ana.attributes) = ("host".to_owned(), "👩 of tomorrow".to_owned(), r#"{"role":"host"}"#.to_owned());
    let mut guest = participant("PA_1", "Ana B.");
    guest.role = "guest".to_owned();
    let metadata = async || store.session(MeetingId::new("RM_1")).await.unwrap().unwrap().metadata;
    deliver(&store, whole(5, "topic 5", EventKind::ParticipantJoined(ana.clone()))).await;
    let session = store.session(MeetingId::new("RM_1")).await.unwrap().unwrap();
    // Neither what is older nor what carries no metadata says anything about it.
    deliver(&store, whole(4, "topic 4", EventKind::ParticipantJoined(guest.clone()))).await;
    deliver(&store, event("RM_1", "room", 6, EventKind::TrackPublished(participant("PA_1", ""), track("TR_1", "mic")))).await;
    assert_eq!(metadata().await, "topic 5");
    let row = &store.participants(session.id.clone()).await.unwrap()[0];
    let told = (&*row.name, &*row.role, &*row.metadata, &*row.attributes);
    assert_eq!(told, ("Ana", "host", "👩 of tomorrow", r#"{"role":"host"}"#));
    deliver(&store, whole(7, "", EventKind::ParticipantLeft(guest))).await;
    let row = &store.participants(session.id).await.unwrap()[0];
    assert_eq!((row.name.as_str(), row.role.as_str(), row.metadata.as_str(), row.attributes.as_str()), ("Ana B.", "guest", "", "{}"));
    assert_eq!(metadata().await, "", "it was taken away");
    let mut secret = track("TR_2", "mic");
    secret.encryption = "GCM".to_owned();
    deliver(&store, event("RM_1", "room", 8, EventKind::TrackPublished(participant("PA_1", ""), secret))).await;
    let tracks = store.tracks(MeetingId::new("RM_1"), ALL).await.unwrap();
    assert_eq!(tracks.iter().map(|track| track.encryption.as_str()).collect::<Vec<_>>(), ["NONE", "GCM"]);
}

pub async fn the_ledger_is_listed_newest_first_by_filter_and_by_page(db: &TestDatabase) {
    let store = db.store().await;
    for (number, received) in [(1, 1_000), (2, 2_000), (3, 2_000), (4, 2_000), (5, 2_001)] {
        let room = number % 2;
        let mut event = started(&format!("RM_{room}"), &format!("room {room}"), 0);
        (event.id, event.name) = (EventId::new(format!("EV_{number}")), format!("name {}", number % 3));
        if number == 5 {
            event.room = None;
        }
        store.apply_event(Arrival { event, body: StoredBody { received_at: at_ms(received), ..body() } }).await.unwrap();
    }
    let list = async |filter: EventFilter, page: Page| {
        let rows = store.webhook_events(filter, page).await.unwrap();
        rows.iter().map(|row| row.id.trim_start_matches("EV_").to_owned()).collect::<String>()
    };
    let time = |millisecond| Some(at_ms(millisecond).naive_utc());
    let none = EventFilter::default;
    for (filter, expected) in [
        (none(), "54321"),
        (EventFilter { event: Some("name 1".to_owned()), ..none() }, "41"),
        (EventFilter { room_name: Some(RoomName::new("room 0").into_string()), ..none() }, "42"),
        (EventFilter { room_sid: Some("RM_1".to_owned()), ..none() }, "31"),
        (EventFilter { outcome: Some(Outcome::NoRoom), ..none() }, "5"),
        (EventFilter { outcome: Some(Outcome::Failed), ..none() }, ""),
        (EventFilter { from: time(2_000), ..none() }, "5432"),
        (EventFilter { to: time(2_000), ..none() }, "1"),
        (EventFilter { from: time(1_000), to: time(2_001), room_sid: Some("RM_0".to_owned()), ..none() }, "42"),
    ] {
        assert_eq!(list(filter.clone(), ALL).await, expected, "{filter:?}");
    }
    let behind = |id: &str, millisecond| Page { limit: 2, after: Some((at_ms(millisecond).naive_utc(), id.to_owned())) };
    assert_eq!(list(none(), Page { limit: 2, after: None }).await, "54");
    assert_eq!(list(none(), behind("EV_4", 2_000)).await, "32", "within one time the id decides");
    assert_eq!(list(none(), behind("EV_2", 2_000)).await, "1");
    let session = store.session(MeetingId::new("RM_0")).await.unwrap().unwrap().id;
    let first = store.transitions(session.clone(), Page { limit: 1, after: None }).await.unwrap();
    let next = store.transitions(session, Page { limit: 9, after: Some((first[0].recorded_at, first[0].id.clone())) }).await.unwrap();
    assert_eq!((first.len(), next.len()), (1, 0));
}

pub async fn events_before_a_time_are_forgotten_however_many_they_are(db: &TestDatabase) {
    let store = db.store().await;
    deliver(&store, started("RM_1", "room", 0)).await;
    // More than go at once.
    let old = (at(0) - TimeDelta::microseconds(1)).naive_utc();
    db.execute(&format!(
        "WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < 1201)
         INSERT INTO webhook_events (id, event, created_at, received_at, understood, body)
         SELECT CAST(n AS TEXT), 'old', '{old}', '{old}', TRUE, '{{}}' FROM numbers"
    ))
    .await
    .unwrap();
    assert_eq!(store.forget_events(at(0).naive_utc()).await.unwrap(), 1_201);
    assert_eq!(store.forget_events(at(0).naive_utc()).await.unwrap(), 0);
    assert_eq!(db.count("webhook_events").await, 1, "what came at that time itself stays");
    assert_eq!(steps(&store, "RM_1").await.len(), 1, "what it told stays too");
}
