//! The start queue, as two servers see it.

use chrono::TimeDelta;
use live_meeting::db::Store;
use live_meeting::db::rows::Host;
use live_meeting::db::rows::egresses::{Egress, EgressFilter, EgressState};
use live_meeting::ids::{EgressId, RoomName, ServerId, TicketId, TrackSid};
use live_meeting::session::event::{EventKind, SessionEvent};
use live_meeting::session::plan::{Reason, Wish};
use live_meeting::session::rules::Rules;

use super::engine::TestDatabase;
use super::fixtures::{ALL, at, deliver, event, participant, track};

const PATIENCE: TimeDelta = TimeDelta::seconds(20);

async fn server(db: &TestDatabase, name: &str) -> Store {
    db.store().await.on_behalf_of(Host { server: ServerId::new(name), autopilot: Some(Rules::default()) })
}

fn published(sid: &str) -> SessionEvent {
    event("RM_1", "room", 1, EventKind::TrackPublished(participant("PA_1", ""), track(sid, "mic")))
}

fn unpublished(sid: &str) -> SessionEvent {
    event("RM_1", "room", 2, EventKind::TrackUnpublished(participant("PA_1", ""), track(sid, "mic")))
}

/// The only row that has not ended.
async fn open(store: &Store) -> Egress {
    let mut open = store.open_egresses().await.unwrap();
    assert_eq!(open.len(), 1, "{open:?}");
    open.remove(0)
}

/// Every row of the queue: state, attempts, last error, reason of the end; oldest first.
async fn rows(store: &Store) -> Vec<(&'static str, i32, Option<String>, Option<String>)> {
    let mut rows = store.egresses(EgressFilter::default(), ALL).await.unwrap();
    rows.sort_by(|a, b| a.row.id.cmp(&b.row.id));
    rows.into_iter().map(|egress| (egress.state.as_str(), egress.row.attempts, egress.row.last_error, egress.row.end_reason)).collect()
}

pub async fn a_track_has_one_open_row_however_many_servers_hear_of_it(db: &TestDatabase) {
    let (one, two) = (server(db, "one").await, server(db, "two").await);
    let (first, second) = tokio::join!(deliver(&one, published("TR_1")), deliver(&two, published("TR_1")));
    drop((first, second));
    deliver(&two, published("TR_1")).await;
    let owned = (one.own_egresses().await.unwrap().len(), two.own_egresses().await.unwrap().len());
    assert!([(1, 0), (0, 1)].contains(&owned), "{owned:?}");
    assert_eq!(open(&one).await, open(&two).await);
    deliver(&one, unpublished("TR_1")).await;
    assert_eq!(rows(&two).await, [("ENDED", 0, None, Some("trackEnded".to_owned()))]);
}

pub async fn a_row_is_asked_for_by_its_own_server_and_its_first_egress_stays(db: &TestDatabase) {
    let (one, two) = (server(db, "one").await, server(db, "two").await);
    deliver(&one, published("TR_1")).await;
    let id = open(&one).await.id;
    assert!(!two.egress_asked(id.clone(), TicketId::new("t0")).await.unwrap(), "it is the other's");
    assert!(one.egress_asked(id.clone(), TicketId::new("t1")).await.unwrap());
    one.egress_put_off(id.clone(), "busy".to_owned(), at(9), false).await.unwrap();
    one.egress_put_off(id.clone(), "no answer".to_owned(), at(9), true).await.unwrap();
    assert_eq!(rows(&one).await, [("QUEUED", 2, Some("no answer".to_owned()), None)]);
    assert!(one.egress_asked(id.clone(), TicketId::new("t2")).await.unwrap());
    assert!(one.egress_agreed(id.clone(), EgressId::new("EG_1"), at(3)).await.unwrap());
    assert!(one.egress_agreed(id.clone(), EgressId::new("EG_1"), at(4)).await.unwrap(), "the same egress, found once more");
    assert!(!one.egress_agreed(id.clone(), EgressId::new("EG_2"), at(5)).await.unwrap(), "another one comes too late");
    assert!(!one.egress_asked(id.clone(), TicketId::new("t3")).await.unwrap(), "there is an egress");
    assert_eq!(open(&one).await.egress_id(), Some(EgressId::new("EG_1")));
    assert_eq!(rows(&one).await, [("STARTING", 3, None, None)]);

    let (ticket, room, track) = (TicketId::new("t2"), RoomName::new("room"), TrackSid::new("TR_1"));
    assert!(two.egress_connected(ticket, room, track, "10.0.0.7".to_owned(), at(6)).await.unwrap());
    assert_eq!((two.own_egresses().await.unwrap().len(), open(&one).await.state), (1, EgressState::Active), "its socket is there");
}

pub async fn rows_of_a_server_that_is_silent_for_long_are_taken_over(db: &TestDatabase) {
    let (one, two) = (server(db, "one").await, server(db, "two").await);
    deliver(&one, published("TR_1")).await;
    let id = open(&one).await.id;
    assert_eq!(one.take_over_egresses(PATIENCE, true, at(0)).await.unwrap(), 0);
    assert_eq!(two.take_over_egresses(PATIENCE, true, at(19)).await.unwrap(), 0);
    assert!(one.egress_asked(id.clone(), TicketId::new("t1")).await.unwrap());
    assert_eq!(two.take_over_egresses(PATIENCE, true, at(21)).await.unwrap(), 1);
    assert_eq!((one.own_egresses().await.unwrap().len(), two.own_egresses().await.unwrap().len()), (0, 1));
    // The first was only slow: it gets nothing back, and asks for nothing any more.
    assert_eq!(one.take_over_egresses(PATIENCE, true, at(22)).await.unwrap(), 0);
    assert!(!one.egress_asked(id.clone(), TicketId::new("t2")).await.unwrap());
    assert!(two.egress_asked(id, TicketId::new("t3")).await.unwrap());
}

pub async fn a_track_that_livekit_did_not_know_is_queued_again_for_an_operator_alone(db: &TestDatabase) {
    let store = server(db, "one").await;
    deliver(&store, published("TR_1")).await;
    let id = open(&store).await.id;
    assert!(store.egress_asked(id.clone(), TicketId::new("t1")).await.unwrap());
    store.egress_lost(id.clone(), Some("no such track".to_owned())).await.unwrap();
    assert!(store.end_egress(id.clone(), Reason::Gone, at(3)).await.unwrap());
    assert!(!store.end_egress(id, Reason::Stopped, at(4)).await.unwrap(), "the first end stays");
    deliver(&store, published("TR_1")).await;
    let gone = ("ENDED", 1, Some("no such track".to_owned()), Some("gone".to_owned()));
    assert_eq!(rows(&store).await, std::slice::from_ref(&gone));
    let (_, queued) = store.wish("room".to_owned(), TrackSid::new("TR_1"), Wish::Record, at(5)).await.unwrap().expect("a known track");
    assert_eq!(queued.map(|egress| egress.state), Some(EgressState::Queued));
    assert_eq!(rows(&store).await, [gone, ("QUEUED", 0, None, None)]);
}
