//! Seals: what is known of finished files, and the files behind rows.

use std::collections::BTreeMap;

use chrono::NaiveDateTime;
use diesel::prelude::*;
use diesel_async::RunQueryDsl;

use super::{Connection, recordings, segments};
use crate::db::DbError;
use crate::db::rows::seals::{Seal, SealRow, SegmentInContext};
use crate::db::rows::{ClosedSegment, Host, SegmentRow};
use crate::db::schema::{recordings as recordings_table, seals, segments as segments_table, sessions};
use crate::ids::{RecordingId, SegmentId};

type InContext = (SegmentRow, String, String, Option<String>, Option<NaiveDateTime>, Option<SealRow>);

/// Of a segment that has just ended. Idempotent.
pub async fn add(connection: &mut Connection, segment: &SegmentId, seal: &Seal) -> Result<(), diesel::result::Error> {
    let mute_spans = serde_json::to_string(&seal.mute_spans).map_err(|error| diesel::result::Error::SerializationError(error.into()))?;
    let columns = (
        seals::segment_id.eq(segment.as_str()),
        seals::recovered.eq(seal.recovered),
        seals::suspect.eq(seal.suspect),
        seals::tail_unverified_ms.eq(i64::try_from(seal.tail_unverified_ms).unwrap_or(i64::MAX)),
        seals::session_offset_ms.eq(seal.session_offset_ms),
        seals::drift_ppm.eq(seal.drift_ppm),
        seals::sha256.eq(&seal.sha256),
        seals::width.eq(seal.width.and_then(|width| i32::try_from(width).ok())),
        seals::height.eq(seal.height.and_then(|height| i32::try_from(height).ok())),
        seals::mute_spans.eq(mute_spans),
    );
    diesel::insert_into(seals::table).values(columns).on_conflict(seals::segment_id).do_nothing().execute(connection).await?;
    Ok(())
}

/// The first hash stays: a finished file has one.
pub async fn set_hashes(connection: &mut Connection, hashes: &[(SegmentId, String)]) -> Result<(), DbError> {
    transaction!(connection, async |connection| {
        for (segment, sha256) in hashes {
            let this = seals::table.filter(seals::segment_id.eq(segment.as_str())).filter(seals::sha256.is_null());
            diesel::update(this).set(seals::sha256.eq(sha256)).execute(connection).await?;
        }
        Ok(())
    })
}

/// What is suspect stays so.
pub async fn call_suspect(connection: &mut Connection, segment: &SegmentId) -> Result<(), DbError> {
    let this = seals::table.filter(seals::segment_id.eq(segment.as_str()));
    diesel::update(this).set(seals::suspect.eq(true)).execute(connection).await?;
    Ok(())
}

/// Those of recordings.
pub async fn of(connection: &mut Connection, recordings: &[String]) -> Result<BTreeMap<String, SealRow>, DbError> {
    let own = segments_table::table.filter(segments_table::recording_id.eq_any(recordings)).select(segments_table::id);
    let rows: Vec<SealRow> = seals::table.filter(seals::segment_id.eq_any(own)).select(SealRow::as_select()).load(connection).await?;
    Ok(rows.into_iter().map(|row| (row.segment_id.clone(), row)).collect())
}

/// Segments of a format that an earlier run of this server left open.
pub async fn open(connection: &mut Connection, format: &str, host: &Host) -> Result<Vec<SegmentInContext>, DbError> {
    let own = segments_table::server_id.eq(host.server.as_str()).or(segments_table::server_id.is_null());
    let rows: Vec<InContext> = segments_table::table
        .inner_join(recordings_table::table.left_join(sessions::table))
        .left_join(seals::table)
        .filter(segments_table::ended_at.is_null())
        .filter(segments_table::format.eq(format))
        .filter(own)
        .select((
            SegmentRow::as_select(),
            recordings_table::meeting_id,
            recordings_table::room_name,
            recordings_table::participant,
            sessions::started_at.nullable(),
            Option::<SealRow>::as_select(),
        ))
        .order(segments_table::id.asc())
        .load(connection)
        .await?;
    Ok(rows.into_iter().map(in_context).collect())
}

/// A page of this server's finished files that have no hash yet, behind `after`.
pub async fn without_hash(
    connection: &mut Connection,
    formats: &[&str],
    after: &str,
    limit: i64,
    host: &Host,
) -> Result<Vec<SegmentInContext>, DbError> {
    let own = segments_table::server_id.eq(host.server.as_str()).or(segments_table::server_id.is_null());
    let rows: Vec<InContext> = segments_table::table
        .inner_join(recordings_table::table.left_join(sessions::table))
        .left_join(seals::table)
        .filter(seals::segment_id.is_not_null())
        .filter(seals::sha256.is_null())
        .filter(segments_table::format.eq_any(formats))
        .filter(segments_table::id.gt(after))
        .filter(own)
        .select((
            SegmentRow::as_select(),
            recordings_table::meeting_id,
            recordings_table::room_name,
            recordings_table::participant,
            sessions::started_at.nullable(),
            Option::<SealRow>::as_select(),
        ))
        .order(segments_table::id.asc())
        .limit(limit)
        .load(connection)
        .await?;
    Ok(rows.into_iter().map(in_context).collect())
}

fn in_context((segment, meeting_id, room_name, participant, session_started_at, seal): InContext) -> SegmentInContext {
    SegmentInContext { segment, meeting_id, room_name, participant, session_started_at, seal }
}

/// Which of these files have a row.
pub async fn with_rows(connection: &mut Connection, format: &str, paths: &[String]) -> Result<Vec<String>, DbError> {
    let rows = segments_table::table.filter(segments_table::format.eq(format)).filter(segments_table::path.eq_any(paths));
    Ok(rows.select(segments_table::path).load(connection).await?)
}

/// A page of this server's files, behind `after`: ids and paths. One that ended with nothing in it may have none.
pub async fn files(connection: &mut Connection, format: &str, after: &str, limit: i64, host: &Host) -> Result<Vec<(String, String)>, DbError> {
    let own = segments_table::server_id.eq(host.server.as_str()).or(segments_table::server_id.is_null());
    let rows = segments_table::table.filter(segments_table::format.eq(format)).filter(segments_table::id.gt(after)).filter(own);
    let rows = rows.filter(segments_table::ended_at.is_null().or(segments_table::frames.gt(0)));
    Ok(rows.select((segments_table::id, segments_table::path)).order(segments_table::id.asc()).limit(limit).load(connection).await?)
}

/// How many files were recovered, and how many are suspect.
pub async fn doubtful(connection: &mut Connection) -> Result<(i64, i64), DbError> {
    let recovered = seals::table.filter(seals::recovered.eq(true)).count().get_result(connection).await?;
    Ok((recovered, seals::table.filter(seals::suspect.eq(true)).count().get_result(connection).await?))
}

/// Ends many segments in one transaction.
pub async fn close_all(connection: &mut Connection, closed: &[ClosedSegment]) -> Result<(), DbError> {
    transaction!(connection, async |connection| {
        for closed in closed {
            segments::close_one(connection, closed).await?;
        }
        Ok(())
    })
}

/// Ends many recordings of an earlier run in one transaction.
pub async fn close_recordings(connection: &mut Connection, crashed: &[RecordingId]) -> Result<(), DbError> {
    transaction!(connection, async |connection| {
        for recording in crashed {
            if let Some(session) = recordings::end(connection, recording, true).await? {
                recordings::link(connection, &session).await?;
            }
        }
        Ok(())
    })
}
