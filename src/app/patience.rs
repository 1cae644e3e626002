//! A start waits for a database that is away (`docs/decisions/0004-journal.md`).

use std::fmt;
use std::pin::pin;
use std::time::{Duration, Instant};

use crate::actors::child::{backoff, jitter};
use crate::db::DbError;

/// How a start waits for the database, and how often it says so.
const START_RETRY: Duration = Duration::from_millis(250);
const MAX_START_RETRY: Duration = Duration::from_secs(5);
/// An answer that takes longer is worth a word.
const START_PATIENCE: Duration = Duration::from_secs(3);
const START_LOG_INTERVAL: Duration = Duration::from_secs(30);

/// Asks the database until it answers. A service manager that restarted the server instead would give up after some tries, and nothing would be recorded
/// when the database is back; what can never succeed ends the start all the same.
pub(super) async fn patiently<T, F: Future<Output = Result<T, DbError>>>(mut ask: impl FnMut() -> F) -> Result<T, DbError> {
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
            match tokio::time::timeout(START_PATIENCE, &mut answer).await {
                Ok(answered) => break answered,
                Err(_) => say(&"there is no answer"),
            }
        };
        match answered {
            Err(error) if error.is_outage() => {
                say(&error);
                tokio::time::sleep(backoff(attempt, START_RETRY, MAX_START_RETRY, jitter())).await;
                attempt += 1;
            }
            outcome => return outcome,
        }
    }
}
