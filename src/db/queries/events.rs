//! Webhook events: each is kept once, together with all that it changes.

use chrono::{DateTime, NaiveDateTime, Utc};
use diesel::prelude::*;
use diesel_async::RunQueryDsl;

use super::{Backend, Connection, changes, egresses};
use crate::db::DbError;
use crate::db::rows::events::{Applied, Arrival, EventFilter, Outcome, WebhookEventRow};
use crate::db::rows::{Host, Page, SessionRow};
use crate::db::schema::webhook_events;
use crate::ids::EventId;
use crate::session::event::{EventKind, SessionEvent};
use crate::session::lifecycle::{self, Cause};

/// Keeps the events and commits the effects of all with them, in their order.
pub async fn apply(connection: &mut Connection, arrivals: &[Arrival], host: &Host) -> Result<Vec<Applied>, DbError> {
    transaction!(connection, async |connection| {
        let mut applied = Vec::with_capacity(arrivals.len());
        for arrival in arrivals {
            applied.push(apply_one(connection, arrival, host).await?);
        }
        Ok(applied)
    })
}

async fn apply_one(connection: &mut Connection, arrival: &Arrival, host: &Host) -> Result<Applied, DbError> {
    let Arrival { event, body } = arrival;
    let outcome = match &event.room {
        _ if !body.understood => Outcome::NotUnderstood,
        None => Outcome::NoRoom,
        Some(_) => Outcome::Applied,
    };
    if !keep(connection, arrival, outcome, None).await? {
        return Ok(Applied::Repeated);
    }
    Ok(Applied::Kept(effects(connection, event, &Cause::Webhook(event.id.clone()), host, body.received_at).await?))
}

/// `false`: it was known, and is counted.
async fn keep(connection: &mut Connection, Arrival { event, body }: &Arrival, outcome: Outcome, problem: Option<&str>) -> Result<bool, DbError> {
    let columns = (
        webhook_events::id.eq(event.id.as_str()),
        webhook_events::event.eq(event.name.replace('\0', "\u{2400}")),
        webhook_events::room_sid.eq(event.room.as_ref().map(|room| room.sid.as_str())),
        webhook_events::room_name.eq(event.room.as_ref().map(|room| room.name.as_str())),
        webhook_events::created_at.eq(event.created_at.naive_utc()),
        webhook_events::received_at.eq(body.received_at.naive_utc()),
        webhook_events::understood.eq(body.understood),
        webhook_events::body.eq(&body.text),
        webhook_events::outcome.eq(outcome.as_str()),
        webhook_events::problem.eq(problem),
    );
    let attempts: i32 = diesel::insert_into(webhook_events::table)
        .values(columns)
        .on_conflict(webhook_events::id)
        .do_update()
        .set(webhook_events::attempts.eq(webhook_events::attempts + 1))
        .returning(webhook_events::attempts)
        .get_result(connection)
        .await?;
    Ok(attempts == 1)
}

async fn effects(
    connection: &mut Connection,
    event: &SessionEvent,
    cause: &Cause,
    host: &Host,
    now: DateTime<Utc>,
) -> Result<Option<SessionRow>, DbError> {
    if let EventKind::Egress(report) = &event.kind
        && report.status.is_final()
    {
        egresses::report_end(connection, &report.id, report.detail.as_deref()).await?;
    }
    match lifecycle::change(event) {
        Some(change) => Ok(Some(changes::apply(connection, change, cause, host, now).await?)),
        None => Ok(None),
    }
}

/// Keeps an event whose effects the database does not take, so that it can be applied again later.
pub async fn keep_failed(connection: &mut Connection, arrival: &Arrival, problem: &str) -> Result<(), DbError> {
    keep(connection, arrival, Outcome::Failed, Some(problem)).await?;
    Ok(())
}

/// Applies a kept event once more, on an operator's word.
pub async fn replay(connection: &mut Connection, event: &SessionEvent, host: &Host, now: DateTime<Utc>) -> Result<Option<SessionRow>, DbError> {
    transaction!(connection, async |connection| {
        let session = effects(connection, event, &Cause::Operator, host, now).await?;
        let outcome = if session.is_some() { Outcome::Applied } else { Outcome::NoRoom };
        let changes = (
            webhook_events::attempts.eq(webhook_events::attempts + 1),
            webhook_events::outcome.eq(outcome.as_str()),
            webhook_events::problem.eq(None::<String>),
        );
        diesel::update(webhook_events::table.filter(webhook_events::id.eq(event.id.as_str()))).set(changes).execute(connection).await?;
        Ok(session)
    })
}

pub async fn find(connection: &mut Connection, id: &EventId) -> Result<Option<WebhookEventRow>, DbError> {
    let query = webhook_events::table.filter(webhook_events::id.eq(id.as_str())).select(WebhookEventRow::as_select());
    Ok(query.first(connection).await.optional()?)
}

/// Newest first.
pub async fn list(connection: &mut Connection, filter: &EventFilter, page: &Page) -> Result<Vec<WebhookEventRow>, DbError> {
    let mut query = webhook_events::table.select(WebhookEventRow::as_select()).into_boxed::<Backend>();
    if let Some(event) = &filter.event {
        query = query.filter(webhook_events::event.eq(event));
    }
    if let Some(room) = &filter.room_name {
        query = query.filter(webhook_events::room_name.eq(room));
    }
    if let Some(room) = &filter.room_sid {
        query = query.filter(webhook_events::room_sid.eq(room));
    }
    if let Some(outcome) = filter.outcome {
        query = query.filter(webhook_events::outcome.eq(outcome.as_str()));
    }
    if let Some(from) = filter.from {
        query = query.filter(webhook_events::received_at.ge(from));
    }
    if let Some(to) = filter.to {
        query = query.filter(webhook_events::received_at.lt(to));
    }
    if let Some((time, id)) = &page.after {
        query = query.filter(webhook_events::received_at.lt(time).or(webhook_events::received_at.eq(time).and(webhook_events::id.lt(id))));
    }
    Ok(query.order((webhook_events::received_at.desc(), webhook_events::id.desc())).limit(page.limit.into()).load(connection).await?)
}

/// Forgets what was received before a time. The number of events.
pub async fn forget(connection: &mut Connection, before: NaiveDateTime) -> Result<usize, DbError> {
    Ok(diesel::delete(webhook_events::table.filter(webhook_events::received_at.lt(before))).execute(connection).await?)
}
