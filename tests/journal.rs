//! With the database away, what comes goes to the journal, and from there to the database when it is back. So it does where PostgreSQL is there and does not take
//! it: lets nobody in, ends the transaction, or does not say whether it has committed.

mod crowded;
mod cut_off;
pub mod databases;
mod door;
mod killed;
mod rows;
mod starts;
mod victims;
mod webhooks;

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStderr};

use self::databases::{Database, Fault};
use crate::support::test_app::{ADMIN_KEY, Builder, TestApp, command};

/// All is replayed within 30 s of the database's return; four times that decide.
const REPLAYED: Duration = Duration::from_secs(4 * 30);
/// The API answers within 2 s; four times that decide.
const ANSWERED: Duration = Duration::from_secs(4 * 2);

fn builder(database: &Database) -> Builder {
    builder_at(&database.url)
}

fn builder_at(database_url: &str) -> Builder {
    // An unoptimised build takes about a second to authenticate a connection to PostgreSQL.
    TestApp::builder().open().env("DATABASE_URL", database_url).env("LIVE_MEETING__DATABASE__CONNECTIONS", "4")
}

/// A server that may not get as far as to listen.
struct Starting {
    child: Child,
    lines: Lines<BufReader<ChildStderr>>,
}

impl Starting {
    fn new(dir: &Path, database_url: &str) -> Self {
        let env = [("DATABASE_URL", database_url), ("ADMIN_API_KEY", ADMIN_KEY), ("HOST", "127.0.0.1"), ("PORT", "0")];
        let env = env.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        let mut child = command(dir, &env).arg("serve").stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stderr.take().unwrap()).lines();
        Self { child, lines }
    }

    /// Waits for a line of the log.
    async fn says(&mut self, text: &str) {
        let said = async {
            let mut log = String::new();
            while let Some(line) = self.lines.next_line().await.unwrap() {
                if line.contains(text) {
                    return;
                }
                log.push_str(&line);
            }
            panic!("it ends and has not said {text:?}: {log}");
        };
        tokio::time::timeout(Duration::from_secs(60), said).await.unwrap_or_else(|_| panic!("it does not say {text:?}"));
    }
}

/// Waits until the journal is empty.
async fn replayed(app: &TestApp) {
    let healthy = async {
        while app.request("GET", "/health", &[], b"").await.json()["status"] != "healthy" {
            tokio::time::sleep(Duration::from_millis(50)).await
        }
    };
    tokio::time::timeout(REPLAYED, healthy).await.unwrap_or_else(|_| panic!("the journal is not replayed:\n{}", app.log()));
}

/// Nothing was lost or refused for good, and nobody has to do anything.
#[track_caller]
fn assert_no_errors(app: &TestApp) {
    assert!(!app.log().contains(" ERROR "), "{}", app.log());
}

/// What `/health` says of the journal.
async fn waiting(app: &TestApp) -> Option<String> {
    let health = app.request("GET", "/health", &[], b"").await.json();
    let reasons = health["reasons"].as_array().cloned().unwrap_or_default();
    reasons.iter().filter_map(Value::as_str).find(|reason| reason.starts_with("journal:")).map(str::to_owned)
}

/// A test of a case for each way in which a database goes.
macro_rules! each_outage {
    ($($test:ident: $case:path;)+) => {
        mod sqlite_locked {
            $(#[tokio::test] async fn $test() { $case(super::Database::sqlite()).await; })+
        }
        mod postgres_stopped {
            $(#[tokio::test] async fn $test() { if let Some(database) = super::Database::postgres(super::Fault::Stopped) { $case(database).await; } })+
        }
        mod postgres_killed {
            $(#[tokio::test] async fn $test() { if let Some(database) = super::Database::postgres(super::Fault::Killed) { $case(database).await; } })+
        }
    };
}

each_outage! {
    w6_webhooks_are_taken_and_applied_in_order_as_if_nothing_had_been: super::webhooks::are_taken_and_applied_in_order;
    w6_webhooks_survive_kill_9_while_the_database_is_away: super::webhooks::survive_kill_9;
    w6_rows_follow_and_the_audio_is_whole: super::rows::follow;
    w6_rows_survive_kill_9_while_the_database_is_away: super::rows::survive_kill_9;
    s7_recording_goes_on_and_the_api_says_come_again: super::rows::recording_goes_on_and_the_api_says_come_again;
    i7_sigterm_ends_in_time_and_loses_no_row: super::rows::sigterm_loses_no_row;
}
