//! Tracks, as events and lists tell them.

use diesel::prelude::*;
use diesel_async::RunQueryDsl;

use super::Connection;
use super::sessions::naive;
use crate::db::DbError;
use crate::db::rows::{SessionRow, TrackRow};
use crate::db::schema::{participants, tracks};
use crate::ids::{Identity, TrackSid, new_row_id};
use crate::session::lifecycle::{Described, Step, TrackDescription, TrackState};
use crate::session::plan::Wish;

type Steps = Vec<(Step, chrono::DateTime<chrono::Utc>)>;

/// Lays what is said over what is known of a track, its row. The session's row must be held.
pub async fn merge(connection: &mut Connection, session: &SessionRow, row: Option<TrackRow>, said: TrackState) -> Result<(TrackRow, Steps), DbError> {
    let Some(row) = row else {
        let steps = said.steps(None);
        let columns = (
            tracks::id.eq(new_row_id()),
            tracks::session_id.eq(&session.id),
            tracks::room_name.eq(&session.room_name),
            tracks::sid.eq(said.sid.as_str()),
            tracks::identity.eq(said.identity.as_str()),
            (
                tracks::kind.eq(&said.description.value.kind),
                tracks::source.eq(&said.description.value.source),
                tracks::name.eq(&said.description.value.name),
                tracks::mime_type.eq(&said.description.value.mime_type),
                tracks::encryption.eq(&said.description.value.encryption),
                tracks::described_at.eq(naive(said.description.at)),
            ),
            tracks::published_at.eq(naive(said.published_at)),
            tracks::unpublished_at.eq(naive(said.unpublished_at)),
            tracks::mute_spans.eq("[]"),
        );
        let made = diesel::insert_into(tracks::table).values(columns).returning(TrackRow::as_returning()).get_result(connection).await?;
        return Ok((made, steps));
    };
    let known = state(&row);
    let steps = said.steps(Some(&known));
    let merged = known.clone().merge(said);
    if merged == known {
        return Ok((row, steps));
    }
    let changes = (
        tracks::identity.eq(merged.identity.as_str()),
        tracks::kind.eq(&merged.description.value.kind),
        tracks::source.eq(&merged.description.value.source),
        tracks::name.eq(&merged.description.value.name),
        tracks::mime_type.eq(&merged.description.value.mime_type),
        tracks::encryption.eq(&merged.description.value.encryption),
        tracks::described_at.eq(naive(merged.description.at)),
        tracks::published_at.eq(naive(merged.published_at)),
        tracks::unpublished_at.eq(naive(merged.unpublished_at)),
    );
    let this = tracks::table.filter(tracks::id.eq(row.id));
    Ok((diesel::update(this).set(changes).returning(TrackRow::as_returning()).get_result(connection).await?, steps))
}

/// A row as a state. Rows of tracks that only an egress connection told of have no SID.
pub fn state(row: &TrackRow) -> TrackState {
    TrackState {
        sid: TrackSid::new(row.sid.clone().unwrap_or_default()),
        identity: Identity::new(row.identity.clone().unwrap_or_default()),
        published_at: row.published_at.map(|time| time.and_utc()),
        unpublished_at: row.unpublished_at.map(|time| time.and_utc()),
        description: Described {
            at: row.described_at.map(|time| time.and_utc()),
            value: TrackDescription {
                kind: row.kind.clone(),
                source: row.source.clone(),
                name: row.name.clone(),
                mime_type: row.mime_type.clone(),
                encryption: row.encryption.clone(),
            },
        },
    }
}

pub async fn find(connection: &mut Connection, session: &str, track: &TrackSid) -> Result<Option<TrackRow>, DbError> {
    let this = tracks::table.filter(tracks::session_id.eq(session)).filter(tracks::sid.eq(track.as_str()));
    Ok(this.select(TrackRow::as_select()).first(connection).await.optional()?)
}

/// Those of some sessions that have one of these SIDs.
pub async fn find_all(connection: &mut Connection, of: &[&str], sids: &[&str]) -> Result<Vec<TrackRow>, DbError> {
    let these = tracks::table.filter(tracks::session_id.eq_any(of)).filter(tracks::sid.eq_any(sids));
    Ok(these.select(TrackRow::as_select()).load(connection).await?)
}

/// Tracks of sessions that LiveKit has told of, and whose end nobody has.
pub async fn published(connection: &mut Connection, of: &[&str]) -> Result<Vec<TrackRow>, DbError> {
    let these =
        tracks::table.filter(tracks::session_id.eq_any(of)).filter(tracks::unpublished_at.is_null()).filter(tracks::published_at.is_not_null());
    Ok(these.select(TrackRow::as_select()).load(connection).await?)
}

pub async fn set_wish(connection: &mut Connection, track: &str, wish: Wish) -> Result<(), DbError> {
    diesel::update(tracks::table.filter(tracks::id.eq(track))).set(tracks::wish.eq(wish.as_str())).execute(connection).await?;
    Ok(())
}

/// The kind of whoever has this identity, as LiveKit told it last.
pub async fn participant_kind(connection: &mut Connection, session: &str, identity: &str) -> Result<Option<String>, DbError> {
    let described = participants::table
        .filter(participants::session_id.eq(session))
        .filter(participants::identity.eq(identity))
        .filter(participants::described_at.is_not_null());
    Ok(described.select(participants::kind).order(participants::described_at.desc()).first(connection).await.optional()?)
}
