//! The start queue: who asks for an egress, and what becomes of it.

use chrono::TimeDelta;
use futures_util::future::join_all;
use live_meeting::db::Store;
use live_meeting::db::rows::egresses::{Adoption, Egress, EgressFilter, EgressState};
use live_meeting::db::rows::{EndReason, Host, NewRecording};
use live_meeting::ids::{EgressId, RecordingId, RoomName, SegmentId, ServerId, StartId, TicketId, TrackSid};
use live_meeting::session::event::{EgressReport, EgressStatus, EventKind, SessionEvent, Track};
use live_meeting::session::plan::{Reason, Wish};
use live_meeting::session::rules::{Action, Rule, Rules};

use super::engine::TestDatabase;
use super::fixtures::{ALL, at, close, closed, deliver, ended, event, new_recording, new_segment, participant, track};

const ROOM: &str = "room";
const PATIENCE: TimeDelta = TimeDelta::seconds(20);

/// The database on behalf of a server that records everything.
async fn server(db: &TestDatabase, name: &str) -> Store {
    db.store().await.on_behalf_of(Host { server: ServerId::new(name), autopilot: Some(Rules::default()) })
}

fn published(track: Track, second: i64) -> SessionEvent {
    event("RM_1", ROOM, second, EventKind::TrackPublished(participant("PA_1", ""), track))
}

fn unpublished(sid: &str, second: i64) -> SessionEvent {
    event("RM_1", ROOM, second, EventKind::TrackUnpublished(participant("PA_1", ""), track(sid, "mic")))
}

fn room() -> RoomName {
    RoomName::new(ROOM)
}

/// All rows of a track, oldest first.
async fn rows(store: &Store, sid: &str) -> Vec<Egress> {
    let filter = EgressFilter { track_sid: Some(sid.to_owned()), ..EgressFilter::default() };
    let mut rows = store.egresses(filter, ALL).await.unwrap();
    rows.reverse();
    rows
}

/// The only row of a track.
async fn row(store: &Store, sid: &str) -> Egress {
    let mut rows = rows(store, sid).await;
    assert_eq!(rows.len(), 1, "{rows:?}");
    rows.remove(0)
}

/// The only row that has not ended.
async fn open(store: &Store) -> Egress {
    let mut open = store.open_egresses().await.unwrap();
    assert_eq!(open.len(), 1, "{open:?}");
    open.remove(0)
}

/// What the rows of `TR_1` tell: state, attempts, last error, reason of the end; oldest first.
async fn told(store: &Store) -> Vec<(&'static str, i32, Option<String>, Option<String>)> {
    let rows = rows(store, "TR_1").await.into_iter();
    rows.map(|egress| (egress.state.as_str(), egress.row.attempts, egress.row.last_error, egress.row.end_reason)).collect()
}

async fn queued(store: &Store, sid: &str) -> StartId {
    deliver(store, published(track(sid, "mic"), 1)).await;
    row(store, sid).await.id
}

fn reasons(egresses: &[Egress]) -> Vec<(EgressState, Option<&str>)> {
    egresses.iter().map(|egress| (egress.state, egress.row.end_reason.as_deref())).collect()
}

pub async fn of_several_servers_one_claims_a_track(db: &TestDatabase) {
    let servers = [server(db, "a").await, server(db, "b").await, server(db, "c").await];
    let told = servers.iter().flat_map(|store| (0..4).map(move |second| deliver(store, published(track("TR_1", "mic"), second))));
    join_all(told).await;
    let claimed = row(&servers[0], "TR_1").await;
    assert_eq!((claimed.state, claimed.row.attempts), (EgressState::Queued, 0));
    let owners = join_all(servers.iter().map(Store::own_egresses)).await;
    let owned: usize = owners.into_iter().map(|rows| rows.unwrap().len()).sum();
    assert_eq!(owned, 1, "it is one server's work");
}

pub async fn an_egress_goes_from_the_queue_to_its_end_and_is_followed_by_one(db: &TestDatabase) {
    let store = server(db, "a").await;
    let id = queued(&store, "TR_1").await;
    assert!(store.egress_asked(id.clone(), TicketId::new("t1")).await.unwrap());
    store.egress_put_off(id.clone(), "busy".to_owned(), at(30), false).await.unwrap();
    let waits = row(&store, "TR_1").await;
    assert_eq!((waits.state, waits.row.last_error.as_deref(), waits.row.due_at), (EgressState::Queued, Some("busy"), at(30).naive_utc()));
    assert!(store.egress_asked(id.clone(), TicketId::new("t2")).await.unwrap());
    assert!(store.egress_agreed(id.clone(), EgressId::new("EG_1"), at(3)).await.unwrap());
    assert!(!store.egress_asked(id.clone(), TicketId::new("t3")).await.unwrap(), "LiveKit has agreed already");
    assert!(store.egress_connected(TicketId::new("t2"), room(), TrackSid::new("TR_1"), "10.0.0.7".to_owned(), at(4)).await.unwrap());
    let active = row(&store, "TR_1").await;
    assert_eq!((active.state, active.row.attempts, active.row.node.as_deref()), (EgressState::Active, 2, Some("10.0.0.7")));
    assert_eq!(active.row.last_error, None, "what works has no error");

    assert!(store.egress_lost(id.clone(), Some("gone".to_owned())).await.unwrap());
    assert!(!store.egress_lost(id.clone(), None).await.unwrap(), "once");
    let both = join_all((0..2).map(|_| store.restart_egress(id.clone(), at(6), at(5)))).await;
    assert!(store.is_former_egress(EgressId::new("EG_1")).await.unwrap());
    assert_eq!(both.into_iter().filter(|restarted| *restarted.as_ref().unwrap()).count(), 1, "one successor");
    let all = rows(&store, "TR_1").await;
    assert_eq!(reasons(&all), [(EgressState::Ended, Some("replaced")), (EgressState::Queued, None)]);
    assert_eq!((all[1].row.restarts, all[1].row.last_error.as_deref(), all[1].row.due_at), (1, Some("gone"), at(6).naive_utc()));
    assert_eq!(store.restarts_since(all[1].row.track_id.clone(), at(5)).await.unwrap(), [at(5)]);
    assert_eq!(store.restarts_since(all[1].row.track_id.clone(), at(6)).await.unwrap().len(), 0);
    assert!(store.end_egress(all[1].id.clone(), Reason::Gone, at(7)).await.unwrap());
    assert!(!store.egress_agreed(all[1].id.clone(), EgressId::new("EG_2"), at(8)).await.unwrap(), "too late");
}

pub async fn what_ends_takes_its_starts_out_of_the_queue(db: &TestDatabase) {
    let store = server(db, "a").await;
    for sid in ["TR_1", "TR_2"] {
        queued(&store, sid).await;
    }
    deliver(&store, unpublished("TR_1", 2)).await;
    assert_eq!(reasons(&rows(&store, "TR_1").await), [(EgressState::Ended, Some("trackEnded"))]);
    assert_eq!(row(&store, "TR_2").await.state, EgressState::Queued);
    deliver(&store, ended("RM_1", ROOM, 3)).await;
    assert_eq!(reasons(&rows(&store, "TR_2").await), [(EgressState::Ended, Some("sessionEnded"))]);
    deliver(&store, published(track("TR_3", "mic"), 4)).await;
    assert_eq!(rows(&store, "TR_3").await, [], "an ended session starts nothing");
    deliver(&store, unpublished("TR_4", 5)).await;
    deliver(&store, published(track("TR_4", "mic"), 4)).await;
    assert_eq!(rows(&store, "TR_4").await, [], "nor does a track whose end came first");
}

pub async fn what_is_not_recorded_says_why_and_an_operator_decides_over_rules(db: &TestDatabase) {
    let store = server(db, "a").await;
    let encrypted = Track { encryption: "GCM".to_owned(), ..track("TR_1", "mic") };
    for second in 0..3 {
        deliver(&store, published(encrypted.clone(), second)).await;
    }
    assert_eq!(reasons(&rows(&store, "TR_1").await), [(EgressState::Skipped, Some("encrypted"))], "once");
    let (_, open) = store.wish(ROOM.to_owned(), TrackSid::new("TR_1"), Wish::Record, at(4)).await.unwrap().unwrap();
    assert_eq!(open, None, "a wish decrypts nothing");
    deliver(&store, published(Track { kind: "VIDEO".to_owned(), ..track("TR_2", "camera") }, 5)).await;
    assert_eq!(rows(&store, "TR_2").await, []);

    queued(&store, "TR_3").await;
    store.wish(ROOM.to_owned(), TrackSid::new("TR_3"), Wish::Stop, at(6)).await.unwrap().unwrap();
    assert_eq!(reasons(&rows(&store, "TR_3").await), [(EgressState::Ended, Some("stopped"))]);
    deliver(&store, published(track("TR_3", "mic"), 7)).await;
    assert_eq!(rows(&store, "TR_3").await.len(), 1, "it is left alone");
    let (_, open) = store.wish(ROOM.to_owned(), TrackSid::new("TR_3"), Wish::Record, at(8)).await.unwrap().unwrap();
    assert_eq!(open.map(|egress| egress.state), Some(EgressState::Queued));
    assert_eq!(store.wish(ROOM.to_owned(), TrackSid::new("TR_none"), Wish::Stop, at(9)).await.unwrap(), None);
    assert_eq!(store.wish("elsewhere".to_owned(), TrackSid::new("TR_3"), Wish::Stop, at(9)).await.unwrap(), None);
    let known = store.known_sessions().await.unwrap().remove(0);
    assert!(known.tracks.iter().all(|track| track.is_settled), "nothing is left to decide: {known:?}");
}

pub async fn webhooks_of_an_egress_end_its_own_row_alone(db: &TestDatabase) {
    let store = server(db, "a").await;
    let id = queued(&store, "TR_1").await;
    store.egress_asked(id.clone(), TicketId::new("t1")).await.unwrap();
    store.egress_agreed(id.clone(), EgressId::new("EG_1"), at(2)).await.unwrap();
    let report = |egress: &str, status| {
        let report = EgressReport { id: EgressId::new(egress), status, detail: Some("write tcp: broken pipe".to_owned()) };
        event("RM_1", ROOM, 3, EventKind::Egress(report))
    };
    deliver(&store, report("EG_1", EgressStatus::Active)).await;
    deliver(&store, report("EG_other", EgressStatus::Failed)).await;
    assert_eq!(row(&store, "TR_1").await.state, EgressState::Starting);
    deliver(&store, report("EG_1", EgressStatus::Failed)).await;
    let lost = row(&store, "TR_1").await;
    assert_eq!((lost.state, lost.row.last_error.as_deref()), (EgressState::Lost, Some("write tcp: broken pipe")));
}

pub async fn a_socket_finds_its_egress_by_ticket_or_by_track(db: &TestDatabase) {
    let (a, b) = (server(db, "a").await, server(db, "b").await);
    let id = queued(&a, "TR_1").await;
    a.egress_asked(id, TicketId::new("t2")).await.unwrap();
    let connected = |ticket: &str, track: &str| b.egress_connected(TicketId::new(ticket), room(), TrackSid::new(track), "node".to_owned(), at(3));
    assert!(!connected("t9", "TR_9").await.unwrap(), "nobody's");
    assert!(connected("t1", "TR_1").await.unwrap(), "of an earlier try");
    let active = row(&a, "TR_1").await;
    assert_eq!((active.row.ticket_id.as_deref(), active.row.server_id.as_str()), (Some("t1"), "b"), "whoever has the socket has the work");
    assert!(!connected("t3", "TR_1").await.unwrap(), "one socket is enough");
}

pub async fn the_work_of_a_silent_server_is_taken_over(db: &TestDatabase) {
    let (one, two) = (server(db, "one").await, server(db, "two").await);
    deliver(&one, published(track("TR_1", "mic"), 1)).await;
    let id = open(&one).await.id;
    assert_eq!(one.take_over_egresses(PATIENCE, true, at(0)).await.unwrap(), 0);
    assert_eq!(two.take_over_egresses(PATIENCE, true, at(20)).await.unwrap(), 0, "it may still live");
    assert!(one.egress_asked(id.clone(), TicketId::new("t1")).await.unwrap());
    assert_eq!(two.take_over_egresses(PATIENCE, false, at(21)).await.unwrap(), 0, "after an outage everybody looks dead");
    assert_eq!(two.take_over_egresses(PATIENCE, true, at(21)).await.unwrap(), 1);
    assert_eq!((one.own_egresses().await.unwrap().len(), two.own_egresses().await.unwrap().len()), (0, 1));
    // The first was only slow: it gets nothing back, and asks for nothing any more.
    assert_eq!(one.take_over_egresses(PATIENCE, true, at(22)).await.unwrap(), 0);
    assert!(!one.egress_asked(id.clone(), TicketId::new("t2")).await.unwrap());
    assert!(two.egress_asked(id, TicketId::new("t3")).await.unwrap());
}

pub async fn a_row_is_asked_for_by_its_own_server_and_its_first_egress_stays(db: &TestDatabase) {
    let (one, two) = (server(db, "one").await, server(db, "two").await);
    deliver(&one, published(track("TR_1", "mic"), 1)).await;
    let id = open(&one).await.id;
    assert!(!two.egress_asked(id.clone(), TicketId::new("t0")).await.unwrap(), "it is the other's");
    assert!(one.egress_asked(id.clone(), TicketId::new("t1")).await.unwrap());
    one.egress_put_off(id.clone(), "busy".to_owned(), at(9), false).await.unwrap();
    one.egress_put_off(id.clone(), "no answer".to_owned(), at(9), true).await.unwrap();
    assert_eq!(told(&one).await, [("QUEUED", 2, Some("no answer".to_owned()), None)]);
    assert!(one.egress_asked(id.clone(), TicketId::new("t2")).await.unwrap());
    assert!(one.egress_agreed(id.clone(), EgressId::new("EG_1"), at(3)).await.unwrap());
    assert!(one.egress_agreed(id.clone(), EgressId::new("EG_1"), at(4)).await.unwrap(), "the same egress, found once more");
    assert!(!one.egress_agreed(id.clone(), EgressId::new("EG_2"), at(5)).await.unwrap(), "another one comes too late");
    assert!(!one.egress_asked(id.clone(), TicketId::new("t3")).await.unwrap(), "there is an egress");
    assert_eq!(open(&one).await.egress_id(), Some(EgressId::new("EG_1")));
    assert_eq!(told(&one).await, [("STARTING", 3, None, None)]);

    let (ticket, track) = (TicketId::new("t2"), TrackSid::new("TR_1"));
    assert!(two.egress_connected(ticket, room(), track, "10.0.0.7".to_owned(), at(6)).await.unwrap());
    assert_eq!((two.own_egresses().await.unwrap().len(), open(&one).await.state), (1, EgressState::Active), "its socket is there");
}

pub async fn a_track_that_livekit_did_not_know_is_queued_again_for_an_operator_alone(db: &TestDatabase) {
    let store = server(db, "one").await;
    deliver(&store, published(track("TR_1", "mic"), 1)).await;
    let id = open(&store).await.id;
    assert!(store.egress_asked(id.clone(), TicketId::new("t1")).await.unwrap());
    store.egress_lost(id.clone(), Some("no such track".to_owned())).await.unwrap();
    assert!(store.end_egress(id.clone(), Reason::Gone, at(3)).await.unwrap());
    assert!(!store.end_egress(id, Reason::Stopped, at(4)).await.unwrap(), "the first end stays");
    deliver(&store, published(track("TR_1", "mic"), 1)).await;
    let gone = ("ENDED", 1, Some("no such track".to_owned()), Some("gone".to_owned()));
    assert_eq!(told(&store).await, std::slice::from_ref(&gone));
    let (_, queued) = store.wish(ROOM.to_owned(), TrackSid::new("TR_1"), Wish::Record, at(5)).await.unwrap().expect("a known track");
    assert_eq!(queued.map(|egress| egress.state), Some(EgressState::Queued));
    assert_eq!(told(&store).await, [gone, ("QUEUED", 0, None, None)]);
}

pub async fn an_egress_without_a_row_is_adopted_where_it_has_business(db: &TestDatabase) {
    let store = server(db, "a").await;
    deliver(&store, published(track("TR_1", "mic"), 1)).await;
    let adopt = |sid: &str, egress: &str| store.adopt_egress(room(), TrackSid::new(sid), EgressId::new(egress), at(5));
    assert_eq!(adopt("TR_1", "EG_1").await.unwrap(), Adoption::Unwanted, "the track has one");
    store.end_egress(row(&store, "TR_1").await.id, Reason::Gone, at(2)).await.unwrap();
    assert_eq!(adopt("TR_1", "EG_1").await.unwrap(), Adoption::Adopted);
    let adopted = rows(&store, "TR_1").await.pop().unwrap();
    assert_eq!((adopted.state, adopted.row.egress_id.as_deref()), (EgressState::Starting, Some("EG_1")));
    assert_eq!(adopt("TR_none", "EG_2").await.unwrap(), Adoption::Unknown);
    store.wish(ROOM.to_owned(), TrackSid::new("TR_1"), Wish::Stop, at(6)).await.unwrap();
    store.end_egress(adopted.id, Reason::Stopped, at(6)).await.unwrap();
    assert_eq!(adopt("TR_1", "EG_3").await.unwrap(), Adoption::Unwanted, "an operator does not want it");
    let skipping = server(db, "b").await.on_behalf_of(Host { server: ServerId::new("b"), autopilot: Some(nothing()) });
    deliver(&skipping, published(track("TR_2", "mic"), 7)).await;
    let by_hand = skipping.adopt_egress(room(), TrackSid::new("TR_2"), EgressId::new("EG_4"), at(8)).await.unwrap();
    assert_eq!(by_hand, Adoption::NotOurs, "who made a ticket for it wants it");
}

/// Rules that record nothing.
fn nothing() -> Rules {
    Rules::new(vec![Rule { room: None, kinds: Vec::new(), identity: None, sources: Vec::new(), action: Action::Ignore }])
}

/// Ana's connection for a track, with its only segment.
async fn recorded(store: &Store, sid: &str, second: i64) -> (RecordingId, SegmentId) {
    let new = NewRecording { track: Some(TrackSid::new(sid)), ..new_recording("RM_1", ROOM, at(second)) };
    let recording = store.open_recording(new).await.unwrap().id;
    let segment = new_segment(&recording, second, None);
    store.open_segment(segment.clone()).await.unwrap();
    (recording, segment.id)
}

pub async fn a_publisher_who_comes_back_is_followed_by_identity_and_source(db: &TestDatabase) {
    let store = server(db, "a").await;
    let screen = Track { source: "SCREEN_SHARE_AUDIO".to_owned(), ..track("TR_screen", "screen") };
    let unknown = |sid: &str| Track { source: "UNKNOWN".to_owned(), ..track(sid, "x") };
    for published_track in [track("TR_1", "mic"), track("TR_2", "mic"), track("TR_3", "mic"), screen, unknown("TR_u1"), unknown("TR_u2")] {
        deliver(&store, published(published_track, 1)).await;
    }
    let (first, segment) = recorded(&store, "TR_1", 2).await;
    let (beside, _) = recorded(&store, "TR_2", 3).await;
    assert_ne!(beside, first, "two at a time are two");
    close(&store, &first, &segment, 4).await;
    deliver(&store, unpublished("TR_1", 4)).await;
    let (screen, _) = recorded(&store, "TR_screen", 5).await;
    assert!(screen != first && screen != beside, "another source is another recording");
    let (again, _) = recorded(&store, "TR_3", 6).await;
    assert_eq!(again, first, "it goes on");
    assert_eq!(store.recording(first).await.unwrap().unwrap().ended_at, None);
    let (unknown, segment) = recorded(&store, "TR_u1", 7).await;
    close(&store, &unknown, &segment, 8).await;
    deliver(&store, unpublished("TR_u1", 8)).await;
    assert_ne!(recorded(&store, "TR_u2", 9).await.0, unknown, "a source that nobody named is not followed");
}

pub async fn a_server_closes_what_itself_left_open(db: &TestDatabase) {
    let (a, b) = (server(db, "a").await, server(db, "b").await);
    deliver(&a, published(track("TR_1", "mic"), 1)).await;
    let (_, of_a) = recorded(&a, "TR_1", 2).await;
    let (open_recordings, open_segments) = (b.open_recordings().await.unwrap(), b.interrupted_segments("wav").await.unwrap());
    assert_eq!((open_recordings.len(), open_segments.len()), (0, 0), "the other's files lie elsewhere");
    assert_eq!(a.interrupted_segments("wav").await.unwrap()[0].segment.id, of_a.as_str());
    a.close_segment(closed(&of_a, 3, EndReason::Crashed)).await.unwrap();
    assert_eq!(a.open_recordings().await.unwrap().len(), 1);
}
