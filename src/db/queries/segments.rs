//! Segments: one row per file.

use diesel::prelude::*;
use diesel::result::{DatabaseErrorKind, Error as DieselError};
use diesel_async::RunQueryDsl;

use super::{Connection, seals};
use crate::db::DbError;
use crate::db::rows::{ClosedSegment, Host, NewSegment, SegmentRow};
use crate::db::schema::{recordings, segments};
use crate::ids::{SegmentId, TicketId, TrackSid};
use crate::video::codec::Container;

/// Idempotent: a segment that is there already stays as it is.
pub async fn open(connection: &mut Connection, new: &NewSegment, host: &Host) -> Result<(), DbError> {
    let columns = (
        segments::id.eq(new.id.as_str()),
        segments::recording_id.eq(new.recording.as_str()),
        segments::path.eq(&new.path),
        segments::format.eq(Container::of(&new.path).as_str()),
        segments::sample_rate.eq(small(new.format.sample_rate)),
        segments::channels.eq(i32::from(new.format.channels)),
        segments::frames.eq(0),
        segments::bytes.eq(0),
        segments::started_at.eq(new.started_at.naive_utc()),
        segments::gaps.eq("[]"),
        segments::ticket_id.eq(new.ticket.as_ref().map(TicketId::as_str)),
        segments::server_id.eq(host.server.as_str()),
        segments::track_sid.eq(new.track.as_ref().map(TrackSid::as_str)),
    );
    let inserted = transaction!(connection, async |connection| {
        let inserted = diesel::insert_into(segments::table).values(columns).on_conflict(segments::id).do_nothing().execute(connection).await?;
        if inserted == 1 {
            // The segment before it may have ended meanwhile, and the recording with it.
            let gone_on = recordings::table.filter(recordings::id.eq(new.recording.as_str())).filter(recordings::ended_at.is_not_null());
            diesel::update(gone_on).set(recordings::ended_at.eq(None::<chrono::NaiveDateTime>)).execute(connection).await?;
        }
        Ok::<_, DieselError>(inserted)
    });
    match inserted {
        Ok(_) => Ok(()),
        // Paths are made unique by the file system, so only the ticket can stand here twice.
        Err(DieselError::DatabaseError(DatabaseErrorKind::UniqueViolation, _)) if new.ticket.is_some() => Err(DbError::TicketSpent),
        Err(error) => Err(error.into()),
    }
}

/// Idempotent: the first ending stays, and the seal that came with it.
pub async fn close(connection: &mut Connection, closed: &ClosedSegment) -> Result<(), DbError> {
    transaction!(connection, async |connection| close_one(connection, closed).await)
}

/// In the caller's transaction.
pub async fn close_one(connection: &mut Connection, closed: &ClosedSegment) -> Result<(), DbError> {
    let gaps = serde_json::to_string(&closed.gaps).map_err(|error| DbError::Unreadable(error.to_string()))?;
    let changes = (
        segments::sample_rate.eq(small(closed.format.sample_rate)),
        segments::channels.eq(i32::from(closed.format.channels)),
        segments::frames.eq(i64::try_from(closed.frames).unwrap_or(i64::MAX)),
        segments::bytes.eq(i64::try_from(closed.bytes).unwrap_or(i64::MAX)),
        segments::ended_at.eq(closed.ended_at.naive_utc()),
        segments::end_reason.eq(closed.reason.as_str()),
        segments::gaps.eq(gaps),
    );
    let open = segments::table.filter(segments::id.eq(closed.id.as_str())).filter(segments::ended_at.is_null());
    if diesel::update(open).set(changes).execute(connection).await? == 1 {
        seals::add(connection, &closed.id, &closed.seal).await?;
    }
    Ok(())
}

pub async fn of(connection: &mut Connection, recordings: &[String]) -> Result<Vec<SegmentRow>, DbError> {
    let query = segments::table.filter(segments::recording_id.eq_any(recordings)).select(SegmentRow::as_select());
    Ok(query.order((segments::started_at.asc(), segments::id.asc())).load(connection).await?)
}

pub async fn find(connection: &mut Connection, id: &SegmentId) -> Result<Option<SegmentRow>, DbError> {
    let query = segments::table.filter(segments::id.eq(id.as_str())).select(SegmentRow::as_select());
    Ok(query.first(connection).await.optional()?)
}

/// A sample rate as the column has it; the ingest lets in no more than 192,000.
fn small(rate: u32) -> i32 {
    i32::try_from(rate).unwrap_or(i32::MAX)
}
