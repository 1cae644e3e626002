//! A start waits for a database that is away (`docs/decisions/0004-journal.md`).

use std::fmt;
use std::pin::pin;
use std::time::{Duration, Instant};

use super::StartError;
use crate::actors::child::{backoff, jitter};

/// How a start waits for the database, and how often it says so.
const START_RETRY: Duration = Duration::from_millis(250);
const MAX_START_RETRY: Duration = Duration::from_secs(5);
/// An answer that takes longer is worth a word.
const START_PATIENCE: Duration = Duration::from_secs(3);
const START_LOG_INTERVAL: Duration = Duration::from_secs(30);

/// Asks the database until it answers. A service manager that restarted the server instead would give up after some tries, and nothing would be recorded
/// when the database is back; what can never succeed ends the start all the same.
pub(super) async fn patiently<T, F: Future<Output = Result<T, StartError>>>(ask: impl FnMut() -> F) -> Result<T, StartError> {
    until_answered(Some(START_PATIENCE), ask).await
}

/// The same for work of which the database is a part only: that it takes its time says nothing of the database.
pub(super) async fn patiently_at_work<T, F: Future<Output = Result<T, StartError>>>(work: impl FnMut() -> F) -> Result<T, StartError> {
    until_answered(None, work).await
}

async fn until_answered<T, F: Future<Output = Result<T, StartError>>>(
    patience: Option<Duration>,
    mut ask: impl FnMut() -> F,
) -> Result<T, StartError> {
    let mut attempt = 0;
    let mut said: Option<Instant> = None;
    let mut say = |problem: &dyn fmt::Display| {
        if said.is_none_or(|said| said.elapsed() >= START_LOG_INTERVAL) {
            log::warn!("the database does not answer, the start waits for it problem={:?}", problem.to_string());
            said = Some(Instant::now());
        }
    };
    loop {
        let mut answer = pin!(ask());
        let answered = loop {
            let Some(patience) = patience else { break answer.await };
            match tokio::time::timeout(patience, &mut answer).await {
                Ok(answered) => break answered,
                Err(_) => say(&"there is no answer"),
            }
        };
        match answered {
            Err(StartError::Database { cause, .. }) if cause.is_outage() => {
                say(&cause);
                tokio::time::sleep(backoff(attempt, START_RETRY, MAX_START_RETRY, jitter())).await;
                attempt += 1;
            }
            outcome => return outcome,
        }
    }
}
