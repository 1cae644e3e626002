//! Lays what is said of a session over what is known, with everything that follows: one transaction of whoever calls.

use std::collections::{BTreeMap, HashMap, HashSet};

use chrono::{DateTime, Utc};
use diesel::prelude::*;
use diesel_async::RunQueryDsl;

use super::{Connection, egresses, recordings, sessions, tracks};
use crate::db::DbError;
use crate::db::rows::egresses::Egress;
use crate::db::rows::events::{NewTransition, TransitionRow};
use crate::db::rows::{Host, Page, ParticipantRow, SessionRow, TrackRow};
use crate::db::schema::transitions;
use crate::ids::{MeetingId, ParticipantSid, RoomName, RoomSid, TrackSid, new_row_id};
use crate::session::lifecycle::{Cause, Change, ParticipantState, Step};
use crate::session::plan::Wish;
use crate::session::reconcile::{KnownSession, KnownTrack};

/// What one transaction changes. A session's row is fetched and held once, however many events speak of it.
pub struct Changes<'a> {
    host: &'a Host,
    /// By their meetings, so that transactions that finish several take them in the same order.
    held: BTreeMap<MeetingId, SessionRow>,
    /// By session and SID: what was fetched ahead, `None` for what is not there. Each is taken once.
    participants: HashMap<(String, ParticipantSid), Option<ParticipantRow>>,
    tracks: HashMap<(String, TrackSid), Option<TrackRow>>,
    steps: Vec<NewTransition>,
}

impl<'a> Changes<'a> {
    pub fn new(host: &'a Host) -> Self {
        Self { host, held: BTreeMap::new(), participants: HashMap::new(), tracks: HashMap::new(), steps: Vec::new() }
    }

    /// Fetches what several changes speak of with one statement for each table: on PostgreSQL a statement costs more than what it does.
    pub async fn fetch(&mut self, connection: &mut Connection, ahead: &[&Change]) -> Result<(), DbError> {
        if ahead.len() < 2 {
            return Ok(());
        }
        let meetings = ahead.iter().map(|change| change.session.room_sid.as_str()).collect();
        for row in sessions::hold(connection, meetings).await? {
            self.held.insert(MeetingId::new(&row.meeting_id), row);
        }
        for change in ahead {
            let Some(session) = self.held.get(&change.session.meeting_id()) else { continue };
            if let Some(participant) = &change.participant {
                self.participants.insert((session.id.clone(), participant.sid.clone()), None);
            }
            if let Some(track) = &change.track {
                self.tracks.insert((session.id.clone(), track.sid.clone()), None);
            }
        }
        let of: Vec<&str> = self.held.values().map(|session| session.id.as_str()).collect();
        if !self.participants.is_empty() {
            let sids: Vec<&str> = ahead.iter().filter_map(|change| Some(change.participant.as_ref()?.sid.as_str())).collect();
            for (session, row) in sessions::find_participants(connection, &of, &sids).await? {
                self.participants.insert((session, ParticipantSid::new(&row.sid)), Some(row));
            }
        }
        if !self.tracks.is_empty() {
            let sids: Vec<&str> = ahead.iter().filter_map(|change| Some(change.track.as_ref()?.sid.as_str())).collect();
            for row in tracks::find_all(connection, &of, &sids).await? {
                if let (Some(session), Some(sid)) = (row.session_id.clone(), row.sid.clone()) {
                    self.tracks.insert((session, TrackSid::new(sid)), Some(row));
                }
            }
        }
        Ok(())
    }

    /// Applies a change and plans what is to become of its track.
    pub async fn apply(&mut self, connection: &mut Connection, change: Change, cause: &Cause, now: DateTime<Utc>) -> Result<SessionRow, DbError> {
        let Change { session, participant, track } = change;
        let meeting = session.meeting_id();
        let (session, steps) = match self.held.remove(&meeting) {
            Some(held) => sessions::merge_held(connection, held, session).await?,
            None => sessions::merge(connection, session).await?,
        };
        let ends = steps.iter().any(|(step, _)| *step == Step::Ended);
        self.note(&session.id, None, &steps, cause, now);
        if let Some(participant) = participant {
            let sid = participant.sid.clone();
            let known = match self.participants.remove(&(session.id.clone(), sid.clone())) {
                Some(fetched) => fetched,
                None => sessions::find_participant(connection, &session.id, &sid).await?,
            };
            let steps = sessions::merge_participant(connection, &session.id, known, participant).await?;
            self.note(&session.id, Some(sid.as_str()), &steps, cause, now);
        }
        if let Some(track) = track {
            let sid = track.sid.clone();
            let known = match self.tracks.remove(&(session.id.clone(), sid.clone())) {
                Some(fetched) => fetched,
                None => tracks::find(connection, &session.id, &sid).await?,
            };
            let (row, steps) = tracks::merge(connection, &session, known, track).await?;
            self.note(&session.id, Some(sid.as_str()), &steps, cause, now);
            egresses::plan_track(connection, &session, &row, cause, self.host, now).await?;
        }
        if ends {
            egresses::end_queued(connection, &session.id, now).await?;
        }
        self.held.insert(meeting, session.clone());
        Ok(session)
    }

    fn note(&mut self, session: &str, subject: Option<&str>, steps: &[(Step, DateTime<Utc>)], cause: &Cause, now: DateTime<Utc>) {
        self.steps.extend(steps.iter().map(|(step, at)| NewTransition {
            id: new_row_id(),
            session_id: session.to_owned(),
            subject: subject.map(str::to_owned),
            step: step.as_str(),
            at: at.naive_utc(),
            cause: cause.as_str(),
            event_id: cause.event().map(|event| event.as_str().to_owned()),
            recorded_at: now.naive_utc(),
        }));
    }

    /// Contract: every transaction ends with it, once. Links recordings to the sessions and writes the steps down.
    pub async fn finish(self, connection: &mut Connection) -> Result<(), DbError> {
        let held: Vec<&SessionRow> = self.held.values().collect();
        match held.as_slice() {
            [] => {}
            [session] => recordings::link(connection, session).await?,
            sessions => recordings::link_all(connection, sessions).await?,
        }
        insert_new!(connection, transitions, &self.steps);
        Ok(())
    }
}

/// All of them or none.
pub async fn apply_all(connection: &mut Connection, changes: Vec<Change>, cause: &Cause, host: &Host, now: DateTime<Utc>) -> Result<(), DbError> {
    transaction!(connection, async |connection| {
        let mut all = Changes::new(host);
        all.fetch(connection, &changes.iter().collect::<Vec<_>>()).await?;
        for change in changes {
            all.apply(connection, change, cause, now).await?;
        }
        all.finish(connection).await
    })
}

/// What an operator wants of a track of an active session.
pub async fn wish(
    connection: &mut Connection,
    room: &str,
    track: &TrackSid,
    wish: Wish,
    cause: &Cause,
    host: &Host,
    now: DateTime<Utc>,
) -> Result<Option<(TrackRow, Option<Egress>)>, DbError> {
    transaction!(connection, async |connection| {
        let Some(session) = sessions::active_of_room(connection, &RoomName::new(room)).await? else { return Ok(None) };
        let Some(known) = tracks::find(connection, &session.id, track).await? else { return Ok(None) };
        tracks::set_wish(connection, &known.id, wish).await?;
        let row = TrackRow { wish: Some(wish.as_str().to_owned()), ..known };
        let step = match wish {
            Wish::Record => Step::RecordWanted,
            Wish::Stop => Step::StopWanted,
        };
        let mut changes = Changes::new(host);
        changes.note(&session.id, Some(track.as_str()), &[(step, now)], cause, now);
        changes.finish(connection).await?;
        egresses::plan_track(connection, &session, &row, cause, host, now).await?;
        let open = egresses::open_of_track(connection, &row.id).await?;
        Ok(Some((row, open)))
    })
}

/// Every session that has not ended, with what is in it.
pub async fn known(connection: &mut Connection, host: &Host) -> Result<Vec<KnownSession>, DbError> {
    let with_egress: HashSet<String> = egresses::tracks_of_open(connection).await?.into_iter().collect();
    let sessions = sessions::active(connection).await?;
    let ids: Vec<&str> = sessions.iter().map(|session| session.id.as_str()).collect();
    let mut participants: HashMap<String, Vec<ParticipantState>> = HashMap::new();
    for (session, row) in sessions::present(connection, &ids).await? {
        participants.entry(session).or_default().push(sessions::participant_state(&row));
    }
    let mut tracks: HashMap<String, Vec<KnownTrack>> = HashMap::new();
    let by_id: HashMap<&str, &SessionRow> = sessions.iter().map(|session| (session.id.as_str(), session)).collect();
    for row in tracks::published(connection, &ids).await? {
        let Some(session) = row.session_id.as_deref().and_then(|id| by_id.get(id)) else { continue };
        let is_settled = with_egress.contains(&row.id) || !egresses::is_wanted(connection, session, &row, host).await?;
        tracks.entry(session.id.clone()).or_default().push(KnownTrack { is_settled, state: tracks::state(&row) });
    }
    let known = sessions.iter().map(|session| KnownSession {
        room_sid: RoomSid::new(session.room_sid.clone().unwrap_or_default()),
        room_name: RoomName::new(&session.room_name),
        metadata: session.metadata.clone(),
        participants: participants.remove(&session.id).unwrap_or_default(),
        tracks: tracks.remove(&session.id).unwrap_or_default(),
    });
    Ok(known.collect())
}

/// The steps of a session, in the order in which they were written down.
pub async fn list(connection: &mut Connection, session: &str, page: &Page) -> Result<Vec<TransitionRow>, DbError> {
    let mut query = transitions::table.filter(transitions::session_id.eq(session)).select(TransitionRow::as_select()).into_boxed::<super::Backend>();
    if let Some((_, id)) = &page.after {
        query = query.filter(transitions::id.gt(id));
    }
    Ok(query.order(transitions::id.asc()).limit(page.limit.into()).load(connection).await?)
}
