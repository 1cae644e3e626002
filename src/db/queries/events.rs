//! Webhook events: each is kept once, together with all that it changes.

use std::collections::HashSet;

use chrono::{DateTime, NaiveDateTime, Utc};
use diesel::prelude::*;
use diesel_async::RunQueryDsl;

use super::changes::Changes;
use super::{Backend, Connection, egresses};
use crate::db::DbError;
use crate::db::rows::events::{Applied, Arrival, EventFilter, NewWebhookEvent, Outcome, WebhookEventRow};
use crate::db::rows::{Host, Page, SessionRow};
use crate::db::schema::webhook_events;
use crate::ids::EventId;
use crate::session::event::{EgressStatus, EventKind, SessionEvent};
use crate::session::lifecycle::{Cause, Change, change};

/// Keeps the events and commits the effects of all with them, in their order.
pub async fn apply(connection: &mut Connection, arrivals: &[Arrival], host: &Host) -> Result<Vec<Applied>, DbError> {
    transaction!(connection, async |connection| {
        let rows: Vec<NewWebhookEvent<'_>> = arrivals.iter().map(|arrival| row(arrival, outcome(arrival), None)).collect();
        let mut new: HashSet<String> = insert_new!(connection, webhook_events, &rows).into_iter().collect();
        let mut changes = Changes::new(host);
        let ahead: Vec<Change> =
            arrivals.iter().filter(|arrival| new.contains(arrival.event.id.as_str())).filter_map(|it| change(&it.event)).collect();
        changes.fetch(connection, &ahead.iter().collect::<Vec<_>>()).await?;
        let mut applied = Vec::with_capacity(arrivals.len());
        for Arrival { event, body } in arrivals {
            // Of those that come twice at once, the first is the new one.
            if new.remove(event.id.as_str()) {
                let cause = Cause::Webhook(event.id.clone());
                applied.push(Applied::Kept(effects(connection, event, &cause, &mut changes, body.received_at).await?));
            } else {
                count_repetition(connection, &event.id).await?;
                applied.push(Applied::Repeated);
            }
        }
        changes.finish(connection).await?;
        Ok(applied)
    })
}

fn outcome(Arrival { event, body }: &Arrival) -> Outcome {
    match &event.room {
        _ if !body.understood => Outcome::NotUnderstood,
        None => Outcome::NoRoom,
        Some(_) => Outcome::Applied,
    }
}

fn row<'a>(Arrival { event, body }: &'a Arrival, outcome: Outcome, problem: Option<&'a str>) -> NewWebhookEvent<'a> {
    NewWebhookEvent {
        id: event.id.as_str(),
        event: event.name.replace('\0', "\u{2400}"),
        room_sid: event.room.as_ref().map(|room| room.sid.as_str()),
        room_name: event.room.as_ref().map(|room| room.name.as_str()),
        created_at: event.created_at.naive_utc(),
        received_at: body.received_at.naive_utc(),
        understood: body.understood,
        body: &body.text,
        outcome: outcome.as_str(),
        problem,
    }
}

async fn count_repetition(connection: &mut Connection, id: &EventId) -> Result<(), DbError> {
    let this = webhook_events::table.filter(webhook_events::id.eq(id.as_str()));
    diesel::update(this).set(webhook_events::attempts.eq(webhook_events::attempts + 1)).execute(connection).await?;
    Ok(())
}

async fn effects(
    connection: &mut Connection,
    event: &SessionEvent,
    cause: &Cause,
    changes: &mut Changes<'_>,
    now: DateTime<Utc>,
) -> Result<Option<SessionRow>, DbError> {
    if let EventKind::Egress(report) = &event.kind
        && report.status.is_final()
    {
        // Of an orderly end the detail is no error.
        let error = report.detail.as_deref().filter(|_| report.status != EgressStatus::Complete);
        egresses::report_end(connection, &report.id, error).await?;
    }
    match change(event) {
        Some(change) => Ok(Some(changes.apply(connection, change, cause, now).await?)),
        None => Ok(None),
    }
}

/// Keeps an event whose effects the database does not take, so that it can be applied again later.
pub async fn keep_failed(connection: &mut Connection, arrival: &Arrival, problem: &str) -> Result<(), DbError> {
    let rows = vec![row(arrival, Outcome::Failed, Some(problem))];
    if insert_new!(connection, webhook_events, &rows).is_empty() {
        count_repetition(connection, &arrival.event.id).await?;
    }
    Ok(())
}

/// Applies a kept event once more, on an operator's word.
pub async fn replay(connection: &mut Connection, event: &SessionEvent, host: &Host, now: DateTime<Utc>) -> Result<Option<SessionRow>, DbError> {
    transaction!(connection, async |connection| {
        let mut changes = Changes::new(host);
        let session = effects(connection, event, &Cause::Operator, &mut changes, now).await?;
        changes.finish(connection).await?;
        let outcome = if session.is_some() { Outcome::Applied } else { Outcome::NoRoom };
        let replayed = (
            webhook_events::attempts.eq(webhook_events::attempts + 1),
            webhook_events::outcome.eq(outcome.as_str()),
            webhook_events::problem.eq(None::<String>),
            webhook_events::understood.eq(true),
        );
        diesel::update(webhook_events::table.filter(webhook_events::id.eq(event.id.as_str()))).set(replayed).execute(connection).await?;
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

/// Forgets at most `most` events that were received before a time. Their number.
pub async fn forget(connection: &mut Connection, before: NaiveDateTime, most: usize) -> Result<usize, DbError> {
    let most = i64::try_from(most).unwrap_or(i64::MAX);
    let old = webhook_events::table.filter(webhook_events::received_at.lt(before)).select(webhook_events::id).limit(most);
    let old: Vec<String> = old.load(connection).await?;
    Ok(diesel::delete(webhook_events::table.filter(webhook_events::id.eq_any(old))).execute(connection).await?)
}
