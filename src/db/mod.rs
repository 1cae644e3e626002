//! What must be remembered: the only user of diesel.
//!
//! One binary serves two engines, chosen by the URL. The queries of `queries/` are compiled twice, once for each engine's connection, so
//! there is one text for both. Every call runs as a task on a runtime that the store owns, and callers await its handle: a caller that hangs
//! up never cancels a query (diesel-async's SQLite wrapper would panic on an actix thread, and a cancelled transaction stays open).

use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use diesel::result::{DatabaseErrorKind, Error as DieselError};
use diesel_migrations::{EmbeddedMigrations, embed_migrations};
use tokio::runtime::Runtime;
use tokio::sync::Notify;

use crate::config::DatabaseUrl;
use crate::ids::{Identity, MeetingId, RecordingId, RoomName, SegmentId, ServerId, TicketId, TrackSid};
use group_commit::Lanes;
use rows::{
    Admission, ClosedSegment, Host, MeasurementRow, NewMeasurement, NewRecording, NewSegment, OpenedRecording, Page, ParticipantRow, RecordingRow,
    SegmentRow, SessionFilter, SessionRow, TrackFacts, TrackRow,
};

const MIGRATIONS: EmbeddedMigrations = embed_migrations!("migrations");

/// How long a call waits for a free connection: one that writes, as long as a webhook may take, since SQLite's writers queue for theirs.
const POOL_WAIT: PoolWait = PoolWait { reader: Duration::from_secs(2), writer: Duration::from_secs(4) };
/// How long SQLite waits for another writer, and PostgreSQL for one statement.
const STATEMENT_WAIT: Duration = Duration::from_secs(5);

struct PoolWait {
    reader: Duration,
    writer: Duration,
}

/// What a store call can fail with.
#[derive(Debug, thiserror::Error)]
pub enum DbError {
    #[error("the database is busy: no connection was free within {0:?}")]
    Busy(Duration),
    /// The call goes on.
    #[error("the database did not answer within {0:?}")]
    Late(Duration),
    #[error("cannot connect to the database: {0}")]
    Connect(String),
    #[error("the database refused: {0}")]
    Query(#[from] DieselError),
    #[error("the database's migrations failed: {0}")]
    Migration(String),
    /// The ticket has opened a connection before.
    #[error("the ticket is spent")]
    TicketSpent,
    #[error("the row holds what this version does not know: {0}")]
    Unreadable(String),
    /// Of a transaction that several shared.
    #[error("{0}")]
    Shared(Arc<DbError>),
    #[error("the store's task was lost: {0}")]
    Lost(#[from] tokio::task::JoinError),
}

impl DbError {
    /// Whether the same call may succeed later without anybody changing it.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Busy(_) | Self::Late(_) | Self::Connect(_) | Self::Lost(_) => true,
            Self::Shared(error) => error.is_retryable(),
            Self::Query(error) => !matches!(
                error,
                DieselError::DatabaseError(
                    DatabaseErrorKind::UniqueViolation
                        | DatabaseErrorKind::ForeignKeyViolation
                        | DatabaseErrorKind::NotNullViolation
                        | DatabaseErrorKind::CheckViolation,
                    _
                ) | DieselError::NotFound
                    | DieselError::SerializationError(_)
                    | DieselError::QueryBuilderError(_)
                    | DieselError::DeserializationError(_)
            ),
            Self::Migration(_) | Self::TicketSpent | Self::Unreadable(_) => false,
        }
    }
}

impl DbError {
    /// Whether the database is not there, is full, a standby, or held by somebody: waiting helps. What it has refused in words, such as a password, does not
    /// change by itself.
    pub fn is_outage(&self) -> bool {
        /// How the drivers say that nobody answers, and PostgreSQL (in English, unless its `lc_messages` says otherwise) that it will soon.
        const NOBODY: [&str; 16] = [
            "error connecting",
            "error communicating",
            "connection",
            "timed out",
            "lookup",
            "database is locked",
            "starting up",
            "shutting down",
            "recovery mode",
            "too many clients",
            "disk is full",
            // How SQLite says the same of what it keeps beside the database.
            "disk I/O error",
            "No space left on device",
            "read-only transaction",
            "statement timeout",
            "deadlock",
        ];
        match self {
            Self::Busy(_) | Self::Late(_) => true,
            Self::Connect(text) | Self::Migration(text) => NOBODY.iter().any(|words| text.contains(words)),
            Self::Query(error) => {
                let text = error.to_string();
                NOBODY.iter().any(|words| text.contains(words))
            }
            Self::Shared(error) => error.is_outage(),
            Self::Lost(_) | Self::TicketSpent | Self::Unreadable(_) => false,
        }
    }
}

/// The database. Cheap to clone.
#[derive(Clone)]
pub struct Store {
    inner: Arc<Inner>,
    host: Arc<Host>,
    /// How long its caller waits for a call; the call itself goes on.
    patience: Option<Duration>,
}

struct Inner {
    engine: Engine,
    lanes: Lanes,
    segments_ended: Notify,
    /// `None` only while it is dropped.
    runtime: Option<Runtime>,
}

enum Engine {
    Sqlite(sqlite::Pools),
    Postgres(postgres::Pools),
}

impl Drop for Inner {
    fn drop(&mut self) {
        // A runtime must not be waited for in an async context.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Runs one query of `queries/` on a connection of the engine in use, as a task of the store.
macro_rules! run {
    ($store:expr, $access:ident, $module:ident :: $query:ident ( $($argument:expr),* )) => {
        match &$store.inner.engine {
            Engine::Sqlite(pools) => {
                let pool = pools.$access.clone();
                $store.task(async move {
                    let mut connection = sqlite::connection(&pool, POOL_WAIT.$access).await?;
                    sqlite::queries::$module::$query(&mut connection, $($argument),*).await
                }).await
            }
            Engine::Postgres(pools) => {
                let pool = pools.$access.clone();
                $store.task(async move {
                    let mut connection = postgres::connection(&pool, POOL_WAIT.$access).await?;
                    postgres::queries::$module::$query(&mut connection, $($argument),*).await
                }).await
            }
        }
    };
}

mod autopilot;
mod events;
mod group_commit;
mod postgres;
pub mod rows;
mod schema;
mod seals;
mod sqlite;

impl Store {
    /// Opens the database and brings its tables up to date. `connections` bounds PostgreSQL's pool.
    ///
    /// # Errors
    /// When it cannot be reached, or a migration fails.
    pub async fn open(url: &DatabaseUrl, connections: u32) -> Result<Self, DbError> {
        let store = Self::connect(url, connections)?;
        match url {
            DatabaseUrl::Sqlite(path) => {
                let path = path.clone();
                store.task(async move { sqlite::migrate(&path).await }).await?;
            }
            DatabaseUrl::Postgres(url) => {
                let url = url.expose().to_owned();
                store.task(async move { postgres::migrate(&url).await }).await?;
            }
        }
        Ok(store)
    }

    fn connect(url: &DatabaseUrl, connections: u32) -> Result<Self, DbError> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("store")
            .enable_all()
            .build()
            .map_err(|error| DbError::Connect(error.to_string()))?;
        let engine = match url {
            DatabaseUrl::Sqlite(path) => Engine::Sqlite(sqlite::Pools::new(path)?),
            DatabaseUrl::Postgres(url) => Engine::Postgres(postgres::Pools::new(url.expose(), connections)?),
        };
        let inner = Arc::new_cyclic(|inner| {
            let lanes = Lanes::start(&runtime, inner, &engine);
            Inner { engine, lanes, segments_ended: Notify::new(), runtime: Some(runtime) }
        });
        let host = Host { server: ServerId::new("alone"), autopilot: None };
        Ok(Self { inner, host: Arc::new(host), patience: None })
    }

    /// The same database on behalf of a server among several, which may start recordings by itself.
    #[must_use]
    pub fn on_behalf_of(self, host: Host) -> Self {
        Self { host: Arc::new(host), ..self }
    }

    /// The same database for callers that would rather have no answer than a late one. What they asked for may happen all the same.
    #[must_use]
    pub fn answering_within(&self, patience: Duration) -> Self {
        Self { patience: Some(patience), ..self.clone() }
    }

    fn host(&self) -> Arc<Host> {
        Arc::clone(&self.host)
    }

    /// The number of migrations that the database has not seen yet. Changes nothing, and makes no database where there is none.
    ///
    /// # Errors
    /// When it cannot be reached.
    pub async fn pending_migrations(url: &DatabaseUrl) -> Result<usize, DbError> {
        let store = Self::connect(url, 1)?;
        match url {
            DatabaseUrl::Sqlite(path) => {
                let path = path.clone();
                store.task(async move { sqlite::pending(&path).await }).await
            }
            DatabaseUrl::Postgres(url) => {
                let url = url.expose().to_owned();
                store.task(async move { postgres::pending(&url).await }).await
            }
        }
    }

    /// Runs `work` where nobody can cancel it.
    async fn task<T: Send + 'static>(&self, work: impl Future<Output = Result<T, DbError>> + Send + 'static) -> Result<T, DbError> {
        let runtime = self.inner.runtime.as_ref().expect("the runtime lives as long as the store");
        let running = runtime.spawn(work);
        match self.patience {
            Some(patience) => tokio::time::timeout(patience, running).await.map_err(|_| DbError::Late(patience))??,
            None => running.await?,
        }
    }

    /// Lets `work` go on, independently of whoever asked for it.
    pub fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        self.inner.runtime.as_ref().expect("the runtime lives as long as the store").spawn(work);
    }

    /// Finds out whether the database takes writes now.
    ///
    /// # Errors
    /// When it does not.
    pub async fn probe(&self) -> Result<(), DbError> {
        run!(self, writer, probe::take_write_lock())
    }

    /// What must be known before a connection is let in.
    pub async fn admit(&self, room: RoomName, meeting: Option<MeetingId>, ticket: Option<TicketId>) -> Result<Admission, DbError> {
        run!(self, reader, recordings::admit(&room, meeting.as_ref(), ticket.as_ref()))
    }

    /// Whether a track is being recorded, or was until this time.
    pub async fn is_recorded(&self, room: RoomName, participant: Option<Identity>, track: TrackSid, since: DateTime<Utc>) -> Result<bool, DbError> {
        run!(self, reader, recordings::is_recorded(&room, participant.as_ref(), &track, since))
    }

    /// Finds the recording that a connection continues, or starts one.
    pub async fn open_recording(&self, new: NewRecording) -> Result<OpenedRecording, DbError> {
        let host = self.host();
        run!(self, writer, recordings::open(&new, &host))
    }

    /// # Errors
    /// [`DbError::TicketSpent`] for a ticket that has opened a connection before.
    pub async fn open_segment(&self, new: NewSegment) -> Result<(), DbError> {
        let host = self.host();
        run!(self, writer, segments::open(&new, &host))
    }

    pub async fn close_segment(&self, closed: ClosedSegment) -> Result<(), DbError> {
        run!(self, writer, segments::close(&closed))?;
        self.note_segments_ended();
        Ok(())
    }

    /// Replaces what the ingest knows of a recording's track.
    pub async fn set_track_facts(&self, recording: RecordingId, facts: TrackFacts) -> Result<(), DbError> {
        run!(self, writer, recordings::set_track_facts(&recording, &facts))
    }

    /// Ends a recording, unless another connection still writes it.
    pub async fn close_recording(&self, recording: RecordingId) -> Result<(), DbError> {
        run!(self, writer, recordings::close(&recording))
    }

    pub async fn add_measurements(&self, measurements: Vec<NewMeasurement>) -> Result<(), DbError> {
        run!(self, writer, measurements::add(&measurements))
    }

    /// Recordings that an earlier run of this server left open.
    pub async fn open_recordings(&self) -> Result<Vec<String>, DbError> {
        let host = self.host();
        run!(self, reader, recordings::all_open(&host))
    }

    pub async fn sessions(&self, filter: SessionFilter, page: Page) -> Result<Vec<SessionRow>, DbError> {
        run!(self, reader, sessions::list(&filter, &page))
    }

    pub async fn session(&self, meeting: MeetingId) -> Result<Option<SessionRow>, DbError> {
        run!(self, reader, sessions::find(&meeting))
    }

    pub async fn participants(&self, session: String) -> Result<Vec<ParticipantRow>, DbError> {
        run!(self, reader, sessions::participants(&session))
    }

    /// The tracks of a meeting, and of recordings that are kept under its name.
    pub async fn tracks(&self, meeting: MeetingId, page: Page) -> Result<Vec<TrackRow>, DbError> {
        run!(self, reader, recordings::tracks(&meeting, &page))
    }

    /// The measurements of a meeting, each with its participant and track SID.
    pub async fn measurements(
        &self,
        meeting: MeetingId,
        participant: Option<String>,
        page: Page,
    ) -> Result<Vec<(MeasurementRow, Option<String>, Option<String>)>, DbError> {
        run!(self, reader, measurements::list(&meeting, participant.as_deref(), &page))
    }

    pub async fn recordings(&self, meeting: Option<MeetingId>, page: Page) -> Result<Vec<RecordingRow>, DbError> {
        run!(self, reader, recordings::list(meeting.as_ref(), &page))
    }

    pub async fn recording(&self, id: RecordingId) -> Result<Option<RecordingRow>, DbError> {
        run!(self, reader, recordings::find(&id))
    }

    /// The segments of recordings, in the order of their making.
    pub async fn segments_of(&self, recordings: Vec<String>) -> Result<Vec<SegmentRow>, DbError> {
        run!(self, reader, segments::of(&recordings))
    }

    pub async fn segment(&self, id: SegmentId) -> Result<Option<SegmentRow>, DbError> {
        run!(self, reader, segments::find(&id))
    }
}

/// Makes the directory of a database file.
fn make_parent(path: &Path) -> Result<(), DbError> {
    match path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        Some(parent) => std::fs::create_dir_all(parent).map_err(|error| DbError::Connect(format!("{}: {error}", parent.display()))),
        None => Ok(()),
    }
}
