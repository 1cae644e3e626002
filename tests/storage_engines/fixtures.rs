//! What the cases put into the store.

use chrono::{DateTime, TimeDelta, Utc};
use live_meeting::audio::format::PcmFormat;
use live_meeting::db::rows::events::{Applied, Arrival, StoredBody};
use live_meeting::db::rows::seals::Seal;
use live_meeting::db::rows::{ClosedSegment, EndReason, NewRecording, NewSegment, Page, TrackKind};
use live_meeting::db::{DbError, Store};
use live_meeting::ids::{EventId, Identity, MeetingId, ParticipantSid, RecordingId, RoomName, RoomSid, SegmentId, TicketId, TrackSid};
use live_meeting::session::event::{EventKind, Participant, Room, SessionEvent, Track};
use uuid::Uuid;

pub const ALL: Page = Page { limit: 1_000, after: None };

pub fn at(second: i64) -> DateTime<Utc> {
    at_ms(second * 1_000)
}

pub fn at_ms(millisecond: i64) -> DateTime<Utc> {
    DateTime::from_timestamp(1_700_000_000, 0).expect("a time") + TimeDelta::milliseconds(millisecond)
}

/// An event with an id of its own.
pub fn event(room_sid: &str, room_name: &str, second: i64, kind: EventKind) -> SessionEvent {
    let room = Room { sid: RoomSid::new(room_sid), name: RoomName::new(room_name), created_at: None, metadata: None };
    let id = EventId::new(format!("EV_{}", Uuid::new_v4().simple()));
    SessionEvent { id, name: "an_event".to_owned(), created_at: at(second), room: Some(room), kind }
}

pub fn started(room_sid: &str, room_name: &str, second: i64) -> SessionEvent {
    event(room_sid, room_name, second, EventKind::RoomStarted)
}

pub fn ended(room_sid: &str, room_name: &str, second: i64) -> SessionEvent {
    event(room_sid, room_name, second, EventKind::RoomEnded)
}

/// As in participant events when it has a name, else as in track events.
pub fn participant(sid: &str, name: &str) -> Participant {
    Participant {
        sid: ParticipantSid::new(sid),
        identity: Identity::new("ana"),
        name: name.to_owned(),
        kind: "STANDARD".to_owned(),
        role: String::new(),
        metadata: String::new(),
        attributes: "{}".to_owned(),
        joined_at: None,
        complete: !name.is_empty(),
    }
}

pub fn track(sid: &str, name: &str) -> Track {
    Track {
        sid: TrackSid::new(sid),
        kind: "AUDIO".to_owned(),
        source: "MICROPHONE".to_owned(),
        name: name.to_owned(),
        mime_type: "audio/opus".to_owned(),
        encryption: "NONE".to_owned(),
    }
}

pub fn body() -> StoredBody {
    StoredBody { text: "{}".to_owned(), understood: true, received_at: at(0) }
}

pub fn arrival(event: SessionEvent) -> Arrival {
    Arrival { event, body: body() }
}

/// As LiveKit would: again, while the database says that it is busy.
pub async fn deliver(store: &Store, event: SessionEvent) -> Applied {
    loop {
        match store.apply_event(arrival(event.clone())).await {
            Err(DbError::Busy(_)) => {}
            answer => return answer.expect("the event is kept"),
        }
    }
}

/// Ana's first sample in track `TR_1`.
pub fn new_recording(meeting: &str, room: &str, started_at: DateTime<Utc>) -> NewRecording {
    NewRecording {
        id: RecordingId::fresh(),
        meeting: MeetingId::new(meeting),
        room: RoomName::new(room),
        participant: Some(Identity::new("ana")),
        track: Some(TrackSid::new("TR_1")),
        kind: TrackKind::Audio,
        started_at,
    }
}

pub async fn open_recording(store: &Store, meeting: &str, room: &str, second: i64) -> RecordingId {
    store.open_recording(new_recording(meeting, room, at(second))).await.expect("opened").id
}

pub fn new_segment(recording: &RecordingId, second: i64, ticket: Option<&str>) -> NewSegment {
    let id = SegmentId::fresh();
    let path = format!("meeting/{id}.wav");
    NewSegment {
        id,
        recording: recording.clone(),
        path,
        format: PcmFormat::LIVEKIT,
        track: None,
        started_at: at(second),
        ticket: ticket.map(TicketId::new),
    }
}

pub async fn open_segment(store: &Store, recording: &RecordingId, second: i64) -> SegmentId {
    let new = new_segment(recording, second, None);
    store.open_segment(new.clone()).await.expect("opened");
    new.id
}

pub fn closed(id: &SegmentId, second: i64, reason: EndReason) -> ClosedSegment {
    ClosedSegment {
        id: id.clone(),
        format: PcmFormat::LIVEKIT,
        frames: 480,
        bytes: 1_920,
        ended_at: at(second),
        reason,
        gaps: Vec::new(),
        seal: Seal::default(),
    }
}

/// Ends a segment, and its recording if that was the last.
pub async fn close(store: &Store, recording: &RecordingId, segment: &SegmentId, second: i64) {
    store.close_segment(closed(segment, second, EndReason::Closed)).await.expect("closed");
    store.close_recording(recording.clone()).await.expect("closed");
}
