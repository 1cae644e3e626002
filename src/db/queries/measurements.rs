//! What analysis services said.

use diesel::prelude::*;
use diesel_async::RunQueryDsl;

use super::{Backend, Connection};
use crate::db::DbError;
use crate::db::rows::{MeasurementRow, NewMeasurement, Page};
use crate::db::schema::{measurements, recordings, sessions as sessions_table};
use crate::ids::MeetingId;

/// All in one transaction. Idempotent.
pub async fn add(connection: &mut Connection, new: &[NewMeasurement]) -> Result<(), DbError> {
    transaction!(connection, async |connection| {
        for measurement in new {
            let scores: serde_json::Map<String, serde_json::Value> =
                measurement.scores.iter().map(|(name, score)| (name.replace('\0', "\u{2400}"), (*score).into())).collect();
            let columns = (
                measurements::id.eq(&measurement.id),
                measurements::recording_id.eq(measurement.recording.as_str()),
                measurements::service.eq(measurement.service.as_ref()),
                measurements::kind.eq(measurement.kind.as_ref()),
                measurements::start_ms.eq(i64::try_from(measurement.start_ms).unwrap_or(i64::MAX)),
                measurements::end_ms.eq(i64::try_from(measurement.end_ms).unwrap_or(i64::MAX)),
                measurements::scores.eq(serde_json::Value::Object(scores).to_string()),
                measurements::warning.eq(measurement.warning.as_ref().map(|warning| warning.replace('\0', "\u{2400}"))),
                measurements::received_at.eq(measurement.received_at.naive_utc()),
            );
            let insert = diesel::insert_into(measurements::table).values(columns).on_conflict(measurements::id).do_nothing();
            insert.execute(connection).await?;
        }
        Ok(())
    })
}

/// With the participant and track of each. Pages by id alone, oldest first.
pub async fn list(
    connection: &mut Connection,
    meeting: &MeetingId,
    participant: Option<&str>,
    page: &Page,
) -> Result<Vec<(MeasurementRow, Option<String>, Option<String>)>, DbError> {
    let session = sessions_table::table.filter(sessions_table::meeting_id.eq(meeting.as_str())).select(sessions_table::id.nullable());
    let mut query = measurements::table
        .inner_join(recordings::table)
        .filter(recordings::meeting_id.eq(meeting.as_str()).or(recordings::session_id.eq_any(session)))
        .select((MeasurementRow::as_select(), recordings::participant, recordings::track_sid))
        .into_boxed::<Backend>();
    if let Some(participant) = participant {
        query = query.filter(recordings::participant.eq(participant));
    }
    if let Some((_, id)) = &page.after {
        query = query.filter(measurements::id.gt(id));
    }
    Ok(query.order(measurements::id.asc()).limit(page.limit.into()).load(connection).await?)
}
