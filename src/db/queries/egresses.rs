//! The start queue: one open row for each track that is to be recorded. Every step names the state it starts from, so that of two who take it one wins.

use chrono::{DateTime, TimeDelta, Utc};
use diesel::prelude::*;
use diesel_async::RunQueryDsl;

use super::{Backend, Connection, tracks};
use crate::db::DbError;
use crate::db::rows::egresses::{Adoption, Egress, EgressFilter, EgressRow, EgressState};
use crate::db::rows::{Host, Page, SessionRow, TrackRow};
use crate::db::schema::{egresses, servers, sessions, tracks as tracks_table, webhook_events};
use crate::ids::{EgressId, Identity, RoomName, ServerId, StartId, TicketId, TrackSid, new_row_id};
use crate::session::lifecycle::{Cause, SessionStatus};
use crate::session::plan::{Plan, Reason, plan};
use crate::session::rules::Rules;

/// How much later than a webhook the answer to a call may come.
const ANSWER_LATENESS: TimeDelta = TimeDelta::minutes(2);

/// How long LiveKit's word that it does not know a track is believed, while it goes on listing it: a room may be missing for a moment.
const REFUSAL_HOLDS: TimeDelta = TimeDelta::seconds(60);

/// Decides about a track and, if it is to be recorded and nobody has asked yet, puts it into the queue.
pub async fn plan_track(
    connection: &mut Connection,
    session: &SessionRow,
    track: &TrackRow,
    cause: &Cause,
    host: &Host,
    now: DateTime<Utc>,
) -> Result<(), DbError> {
    let Some(rules) = &host.autopilot else { return Ok(()) };
    let reason = match decide(connection, session, track, rules).await? {
        // A track that only its end has told of was never there for us.
        Plan::Record(_) | Plan::AskKind if track.published_at.is_none() => return Ok(()),
        Plan::Record(_) | Plan::AskKind if *cause != Cause::Operator && is_unknown_to_livekit(connection, track, now).await? => return Ok(()),
        Plan::Record(_) | Plan::AskKind => return insert(connection, track, EgressState::Queued, None, host, now).await,
        Plan::Leave(reason) => reason,
    };
    let of_track = egresses::table.filter(egresses::track_id.eq(&track.id));
    let waiting = of_track.filter(egresses::ended_at.is_null()).filter(egresses::state.eq(EgressState::Queued.as_str()));
    let gone = diesel::update(waiting).set(ended(reason, now)).execute(connection).await?;
    if gone == 0 && reason.is_choice() {
        let known: i64 = of_track.count().get_result(connection).await?;
        if known == 0 {
            return insert(connection, track, EgressState::Skipped, Some(reason), host, now).await;
        }
    }
    Ok(())
}

/// Whether LiveKit has refused to start an egress of this track for not knowing it, a moment ago. It is not asked again so soon, but on an operator's word.
async fn is_unknown_to_livekit(connection: &mut Connection, track: &TrackRow, now: DateTime<Utc>) -> Result<bool, DbError> {
    let refused = egresses::table
        .filter(egresses::track_id.eq(&track.id))
        .filter(egresses::ended_at.ge((now - REFUSAL_HOLDS).naive_utc()))
        .filter(egresses::end_reason.eq(Reason::Gone.as_str()))
        .filter(egresses::egress_id.is_null())
        .filter(egresses::attempts.gt(0));
    let refused: i64 = refused.count().get_result(connection).await?;
    Ok(refused > 0)
}

/// Whether a published track is to be recorded, as far as is known.
pub async fn is_wanted(connection: &mut Connection, session: &SessionRow, track: &TrackRow, host: &Host) -> Result<bool, DbError> {
    let Some(rules) = &host.autopilot else { return Ok(false) };
    Ok(match decide(connection, session, track, rules).await? {
        Plan::Record(_) | Plan::AskKind => !is_unknown_to_livekit(connection, track, Utc::now()).await?,
        Plan::Leave(_) => false,
    })
}

/// Claims the start, if nobody has; or writes down why there is none.
async fn insert(
    connection: &mut Connection,
    track: &TrackRow,
    state: EgressState,
    reason: Option<Reason>,
    host: &Host,
    now: DateTime<Utc>,
) -> Result<(), DbError> {
    let columns = (
        egresses::id.eq(new_row_id()),
        egresses::track_id.eq(&track.id),
        egresses::server_id.eq(host.server.as_str()),
        egresses::state.eq(state.as_str()),
        egresses::attempts.eq(0),
        egresses::restarts.eq(0),
        egresses::created_at.eq(now.naive_utc()),
        egresses::due_at.eq(now.naive_utc()),
        egresses::ended_at.eq(reason.map(|_| now.naive_utc())),
        egresses::end_reason.eq(reason.map(Reason::as_str)),
    );
    diesel::insert_into(egresses::table).values(columns).on_conflict_do_nothing().execute(connection).await?;
    Ok(())
}

type Ending<'a> = (
    diesel::dsl::Eq<egresses::state, &'a str>,
    diesel::dsl::Eq<egresses::ended_at, chrono::NaiveDateTime>,
    diesel::dsl::Eq<egresses::end_reason, &'a str>,
);

fn ended(reason: Reason, now: DateTime<Utc>) -> Ending<'static> {
    (egresses::state.eq(EgressState::Ended.as_str()), egresses::ended_at.eq(now.naive_utc()), egresses::end_reason.eq(reason.as_str()))
}

async fn decide(connection: &mut Connection, session: &SessionRow, track: &TrackRow, rules: &Rules) -> Result<Plan, DbError> {
    let (room, identity) = (RoomName::new(&session.room_name), Identity::new(track.identity.clone().unwrap_or_default()));
    let active = session.status == SessionStatus::Active.as_str();
    let planned = plan(&track.facts(&room, &identity, None, active), rules);
    if planned != Plan::AskKind {
        return Ok(planned);
    }
    let kind = tracks::participant_kind(connection, &session.id, identity.as_str()).await?;
    Ok(plan(&track.facts(&room, &identity, kind.as_deref(), active), rules))
}

/// Takes what waits of a session out of the queue.
pub async fn end_queued(connection: &mut Connection, session: &str, now: DateTime<Utc>) -> Result<(), DbError> {
    let of_session = tracks_table::table.filter(tracks_table::session_id.eq(session)).select(tracks_table::id);
    let waiting = egresses::table.filter(egresses::track_id.eq_any(of_session)).filter(egresses::state.eq(EgressState::Queued.as_str()));
    diesel::update(waiting).set(ended(Reason::SessionEnded, now)).execute(connection).await?;
    Ok(())
}

/// The open rows: of one server, or of all.
pub async fn open(connection: &mut Connection, server: Option<&ServerId>) -> Result<Vec<Egress>, DbError> {
    let mut open = joined().filter(egresses::ended_at.is_null()).into_boxed::<Backend>();
    if let Some(server) = server {
        open = open.filter(egresses::server_id.eq(server.as_str()));
    }
    whole(open.select(columns()).order(egresses::id.asc()).load(connection).await?)
}

/// The tracks that somebody is at.
pub async fn tracks_of_open(connection: &mut Connection) -> Result<Vec<String>, DbError> {
    Ok(egresses::table.filter(egresses::ended_at.is_null()).select(egresses::track_id).load(connection).await?)
}

/// One row, open or not.
pub async fn find(connection: &mut Connection, id: &StartId) -> Result<Option<Egress>, DbError> {
    let this = joined().filter(egresses::id.eq(id.as_str())).select(columns());
    Ok(whole(this.load(connection).await?)?.pop())
}

pub async fn open_of_track(connection: &mut Connection, track: &str) -> Result<Option<Egress>, DbError> {
    let this = joined().filter(egresses::track_id.eq(track)).filter(egresses::ended_at.is_null()).select(columns());
    Ok(whole(this.load(connection).await?)?.pop())
}

/// Newest first.
pub async fn list(connection: &mut Connection, filter: &EgressFilter, page: &Page) -> Result<Vec<Egress>, DbError> {
    let mut query = joined().into_boxed::<Backend>();
    if let Some(state) = filter.state {
        query = query.filter(egresses::state.eq(state.as_str()));
    }
    if let Some(room) = &filter.room_name {
        query = query.filter(sessions::room_name.eq(room));
    }
    if let Some(track) = &filter.track_sid {
        query = query.filter(tracks_table::sid.eq(track));
    }
    if let Some(meeting) = &filter.meeting_id {
        query = query.filter(sessions::meeting_id.eq(meeting));
    }
    if let Some((time, id)) = &page.after {
        query = query.filter(egresses::created_at.lt(time).or(egresses::created_at.eq(time).and(egresses::id.lt(id))));
    }
    let query = query.select(columns()).order((egresses::created_at.desc(), egresses::id.desc()));
    whole(query.limit(page.limit.into()).load(connection).await?)
}

#[diesel::dsl::auto_type]
fn joined() -> _ {
    egresses::table.inner_join(tracks_table::table.inner_join(sessions::table))
}

type Columns<DB> = (diesel::dsl::AsSelect<EgressRow, DB>, diesel::dsl::AsSelect<TrackRow, DB>, diesel::dsl::AsSelect<SessionRow, DB>);

fn columns() -> Columns<Backend> {
    (EgressRow::as_select(), TrackRow::as_select(), SessionRow::as_select())
}

fn whole(rows: Vec<(EgressRow, TrackRow, SessionRow)>) -> Result<Vec<Egress>, DbError> {
    rows.into_iter().map(|(row, track, session)| Egress::new(row, track, &session)).collect()
}

/// LiveKit is about to be asked with this ticket. `false`: it is not wanted any more, there is an egress already, or another server has taken it over.
pub async fn asked(connection: &mut Connection, id: &StartId, ticket: &TicketId, host: &Host) -> Result<bool, DbError> {
    let may_ask = [EgressState::Queued.as_str(), EgressState::Starting.as_str()];
    let this = egresses::table
        .filter(egresses::id.eq(id.as_str()))
        .filter(egresses::state.eq_any(may_ask))
        .filter(egresses::server_id.eq(host.server.as_str()))
        .filter(egresses::egress_id.is_null())
        .filter(egresses::connected_at.is_null());
    let asked =
        (egresses::state.eq(EgressState::Starting.as_str()), egresses::ticket_id.eq(ticket.as_str()), egresses::attempts.eq(egresses::attempts + 1));
    Ok(diesel::update(this).set(asked).execute(connection).await? == 1)
}

/// LiveKit has agreed, or an egress that was thought lost was found. Its socket may have come before.
pub async fn agreed(connection: &mut Connection, id: &StartId, egress: &EgressId, now: DateTime<Utc>) -> Result<bool, DbError> {
    transaction!(connection, async |connection| {
        // Where two servers have asked, the first answer counts.
        let is_free = egresses::egress_id.is_null().or(egresses::egress_id.eq(egress.as_str()));
        let this = egresses::table.filter(egresses::id.eq(id.as_str())).filter(egresses::ended_at.is_null()).filter(is_free);
        let changes = (egresses::egress_id.eq(egress.as_str()), egresses::started_at.eq(now.naive_utc()), egresses::last_error.eq(None::<String>));
        let agreed = diesel::update(this).set(changes).execute(connection).await? == 1;
        if !agreed {
            return Ok(false);
        }
        // Found while it waited to be asked for again.
        let waiting = egresses::table.filter(egresses::id.eq(id.as_str())).filter(egresses::state.eq(EgressState::Queued.as_str()));
        diesel::update(waiting).set(egresses::state.eq(EgressState::Starting.as_str())).execute(connection).await?;
        // Its end may have been told before its start was answered.
        let room = egresses::table.inner_join(tracks_table::table).filter(egresses::id.eq(id.as_str())).select(tracks_table::room_name.nullable());
        let told = webhook_events::table
            .filter(webhook_events::event.eq("egress_ended"))
            .filter(webhook_events::room_name.eq_any(room))
            .filter(webhook_events::received_at.ge((now - ANSWER_LATENESS).naive_utc()))
            .filter(webhook_events::body.like(format!("%\"{}\"%", egress.as_str())));
        if told.select(webhook_events::id).first::<String>(connection).await.optional()?.is_some() {
            lost(connection, id, Some("it ended before it was known to have started")).await?;
        }
        Ok(true)
    })
}

/// LiveKit has not agreed: again later. Not where another server was agreed with meanwhile.
pub async fn put_off(connection: &mut Connection, id: &StartId, error: &str, due: DateTime<Utc>, counts: bool, host: &Host) -> Result<(), DbError> {
    let this = egresses::table
        .filter(egresses::id.eq(id.as_str()))
        .filter(egresses::server_id.eq(host.server.as_str()))
        .filter(egresses::ended_at.is_null())
        .filter(egresses::egress_id.is_null())
        .filter(egresses::connected_at.is_null());
    let waits = (
        egresses::state.eq(EgressState::Queued.as_str()),
        egresses::last_error.eq(error),
        egresses::due_at.eq(due.naive_utc()),
        egresses::attempts.eq(egresses::attempts + i32::from(counts)),
    );
    diesel::update(this).set(waits).execute(connection).await?;
    Ok(())
}

/// Whether an egress was one of ours that has been replaced or stopped.
pub async fn is_former(connection: &mut Connection, egress: &EgressId) -> Result<bool, DbError> {
    let former = egresses::table.filter(egresses::egress_id.eq(egress.as_str())).filter(egresses::ended_at.is_not_null());
    Ok(former.select(egresses::id).first::<String>(connection).await.optional()?.is_some())
}

/// The socket of an egress is open: the egress is the business of the server that holds it. An egress of an earlier try has an earlier ticket, so what the
/// ticket does not find, the track does.
pub async fn connected(
    connection: &mut Connection,
    (ticket, room, track): (&TicketId, &RoomName, &TrackSid),
    node: &str,
    host: &Host,
    now: DateTime<Utc>,
) -> Result<bool, DbError> {
    let open = egresses::table.filter(egresses::ended_at.is_null());
    let by_ticket: Option<String> = open.filter(egresses::ticket_id.eq(ticket.as_str())).select(egresses::id).first(connection).await.optional()?;
    let of_ticket = egresses::table.filter(egresses::ticket_id.eq(ticket.as_str())).select(egresses::id);
    let found = match by_ticket {
        Some(found) => Some(found),
        // Its row has ended meanwhile; the open one is another egress's.
        None if of_ticket.first::<String>(connection).await.optional()?.is_some() => None,
        None => {
            let tracks = tracks_table::table.filter(tracks_table::room_name.eq(room.as_str())).filter(tracks_table::sid.eq(track.as_str()));
            let of_track = open.filter(egresses::track_id.eq_any(tracks.select(tracks_table::id))).filter(egresses::connected_at.is_null());
            of_track.select(egresses::id).first(connection).await.optional()?
        }
    };
    let Some(found) = found else { return Ok(false) };
    let active = (
        egresses::state.eq(EgressState::Active.as_str()),
        egresses::server_id.eq(host.server.as_str()),
        egresses::ticket_id.eq(ticket.as_str()),
        egresses::node.eq(node),
        egresses::connected_at.eq(now.naive_utc()),
        egresses::last_error.eq(None::<String>),
    );
    let this = egresses::table.filter(egresses::id.eq(found)).filter(egresses::ended_at.is_null());
    Ok(diesel::update(this).set(active).execute(connection).await? == 1)
}

/// Takes an egress that runs without a row as the track's own, where it is to be recorded and has none.
pub async fn adopt(
    connection: &mut Connection,
    (room, track): (&RoomName, &TrackSid),
    egress: &EgressId,
    host: &Host,
    now: DateTime<Utc>,
) -> Result<Adoption, DbError> {
    let Some(rules) = &host.autopilot else { return Ok(Adoption::NotOurs) };
    let Some((session, track)) = newest_of(connection, room, track).await? else { return Ok(Adoption::Unknown) };
    match decide(connection, &session, &track, rules).await? {
        Plan::Record(_) | Plan::AskKind => {}
        // Somebody made a ticket for it by hand: that stands over a rule.
        Plan::Leave(Reason::Rule) => return Ok(Adoption::NotOurs),
        Plan::Leave(_) => return Ok(Adoption::Unwanted),
    }
    let columns = (
        egresses::id.eq(new_row_id()),
        egresses::track_id.eq(&track.id),
        egresses::server_id.eq(host.server.as_str()),
        egresses::state.eq(EgressState::Starting.as_str()),
        egresses::egress_id.eq(egress.as_str()),
        egresses::attempts.eq(0),
        egresses::restarts.eq(0),
        egresses::created_at.eq(now.naive_utc()),
        egresses::due_at.eq(now.naive_utc()),
        egresses::started_at.eq(now.naive_utc()),
    );
    let adopted = diesel::insert_into(egresses::table).values(columns).on_conflict_do_nothing().execute(connection).await? == 1;
    Ok(if adopted { Adoption::Adopted } else { Adoption::Unwanted })
}

/// The track in the newest session of its room that knows it, even one that has ended.
async fn newest_of(connection: &mut Connection, room: &RoomName, track: &TrackSid) -> Result<Option<(SessionRow, TrackRow)>, DbError> {
    let known = tracks_table::table
        .inner_join(sessions::table)
        .filter(sessions::room_name.eq(room.as_str()))
        .filter(tracks_table::sid.eq(track.as_str()))
        .order((sessions::started_at.desc(), sessions::id.desc()));
    Ok(known.select((SessionRow::as_select(), TrackRow::as_select())).first(connection).await.optional()?)
}

/// The socket or the egress ended.
pub async fn lost(connection: &mut Connection, id: &StartId, error: Option<&str>) -> Result<bool, DbError> {
    let live = [EgressState::Starting.as_str(), EgressState::Active.as_str()];
    let this = egresses::table.filter(egresses::id.eq(id.as_str())).filter(egresses::state.eq_any(live));
    let state = egresses::state.eq(EgressState::Lost.as_str());
    let changed = match error {
        Some(error) => diesel::update(this).set((state, egresses::last_error.eq(error))).execute(connection).await?,
        None => diesel::update(this).set(state).execute(connection).await?,
    };
    Ok(changed == 1)
}

/// What a webhook says of the end of an egress, if it is one of ours. In the transaction of that event.
pub async fn report_end(connection: &mut Connection, egress: &EgressId, detail: Option<&str>) -> Result<(), DbError> {
    let this = egresses::table.filter(egresses::egress_id.eq(egress.as_str()));
    if let Some(detail) = detail {
        diesel::update(this).set(egresses::last_error.eq(detail)).execute(connection).await?;
    }
    let live = [EgressState::Starting.as_str(), EgressState::Active.as_str()];
    diesel::update(this.filter(egresses::state.eq_any(live))).set(egresses::state.eq(EgressState::Lost.as_str())).execute(connection).await?;
    Ok(())
}

pub async fn end(connection: &mut Connection, id: &StartId, reason: Reason, now: DateTime<Utc>) -> Result<bool, DbError> {
    let this = egresses::table.filter(egresses::id.eq(id.as_str())).filter(egresses::ended_at.is_null());
    Ok(diesel::update(this).set(ended(reason, now)).execute(connection).await? == 1)
}

/// Ends a row and queues the one that follows it. `false`: somebody else has ended it.
pub async fn restart(connection: &mut Connection, id: &StartId, due: DateTime<Utc>, host: &Host, now: DateTime<Utc>) -> Result<bool, DbError> {
    transaction!(connection, async |connection| {
        if !end(connection, id, Reason::Replaced, now).await? {
            return Ok(false);
        }
        let old: EgressRow = egresses::table.filter(egresses::id.eq(id.as_str())).select(EgressRow::as_select()).first(connection).await?;
        let next = (
            egresses::id.eq(new_row_id()),
            egresses::track_id.eq(&old.track_id),
            egresses::server_id.eq(host.server.as_str()),
            egresses::state.eq(EgressState::Queued.as_str()),
            egresses::attempts.eq(0),
            egresses::restarts.eq(old.restarts + 1),
            egresses::last_error.eq(&old.last_error),
            egresses::created_at.eq(now.naive_utc()),
            egresses::due_at.eq(due.naive_utc()),
        );
        diesel::insert_into(egresses::table).values(next).execute(connection).await?;
        Ok(true)
    })
}

/// When the egresses of a track that others followed were queued, since a time; oldest first.
pub async fn restarts_since(connection: &mut Connection, track: &str, since: DateTime<Utc>) -> Result<Vec<DateTime<Utc>>, DbError> {
    let followed =
        egresses::table.filter(egresses::track_id.eq(track)).filter(egresses::restarts.gt(0)).filter(egresses::created_at.ge(since.naive_utc()));
    let times: Vec<chrono::NaiveDateTime> = followed.select(egresses::created_at).order(egresses::created_at.asc()).load(connection).await?;
    Ok(times.into_iter().map(|time| time.and_utc()).collect())
}

/// Tells the others that this server lives, and takes over the open rows of those who do not. The number of rows taken.
///
/// `takes`: whether this server has been able to say so for a while itself. After an outage of the database everybody looks dead for a moment.
pub async fn take_over(connection: &mut Connection, host: &Host, patience: TimeDelta, takes: bool, now: DateTime<Utc>) -> Result<usize, DbError> {
    let alive = (servers::id.eq(host.server.as_str()), servers::seen_at.eq(now.naive_utc()));
    diesel::insert_into(servers::table)
        .values(alive)
        .on_conflict(servers::id)
        .do_update()
        .set(servers::seen_at.eq(now.naive_utc()))
        .execute(connection)
        .await?;
    if !takes {
        return Ok(0);
    }
    let living = servers::table.filter(servers::seen_at.ge((now - patience).naive_utc())).select(servers::id);
    let orphaned = egresses::table.filter(egresses::ended_at.is_null()).filter(egresses::server_id.ne_all(living));
    Ok(diesel::update(orphaned).set(egresses::server_id.eq(host.server.as_str())).execute(connection).await?)
}
