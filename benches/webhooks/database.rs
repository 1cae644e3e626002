//! The database that the server under test writes to, and what is in it afterwards.

use std::path::Path;

use anyhow::Context;
use diesel::sqlite::SqliteConnection;
use diesel::{Connection, QueryableByName, RunQueryDsl, sql_query};
use tokio::runtime::Runtime;
use tokio_postgres::{Client, NoTls};

const APPLIED: &str = "SELECT count(*) AS number FROM webhook_events WHERE outcome = 'applied'";

pub enum Database {
    Sqlite {
        url: String,
    },
    /// A database of its own, which goes when this is dropped.
    Postgres {
        url: String,
        name: String,
        server: Client,
        runtime: Box<Runtime>,
    },
}

#[derive(QueryableByName)]
struct Number {
    #[diesel(sql_type = diesel::sql_types::BigInt)]
    number: i64,
}

impl Database {
    pub fn sqlite(directory: &Path) -> Self {
        Self::Sqlite { url: format!("sqlite:{}", directory.join("bench.db").display()) }
    }

    pub fn postgres(server_url: &str) -> anyhow::Result<Self> {
        let runtime = Box::new(tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?);
        let name = format!("live_meeting_bench_{}", std::process::id());
        let server = runtime.block_on(connect(server_url))?;
        runtime.block_on(server.batch_execute(&format!("CREATE DATABASE {name}"))).context("cannot make a database")?;
        let (base, _) = server_url.rsplit_once('/').context("TEST_POSTGRES_URL names no database")?;
        Ok(Self::Postgres { url: format!("{base}/{name}"), name, server, runtime })
    }

    pub fn url(&self) -> &str {
        match self {
            Self::Sqlite { url } | Self::Postgres { url, .. } => url,
        }
    }

    /// What a commit means on that server.
    pub fn durability(&self) -> anyhow::Result<String> {
        match self {
            Self::Sqlite { .. } => Ok("synchronous=FULL".to_owned()),
            Self::Postgres { server, runtime, .. } => {
                let query = "SELECT 'fsync=' || current_setting('fsync') || ' synchronous_commit=' || current_setting('synchronous_commit')";
                Ok(runtime.block_on(server.query_one(query, &[]))?.get(0))
            }
        }
    }

    pub fn applied_events(&self) -> anyhow::Result<u64> {
        let number = match self {
            Self::Sqlite { url } => {
                let path = url.strip_prefix("sqlite:").context("a path")?;
                sql_query(APPLIED).get_result::<Number>(&mut SqliteConnection::establish(path)?)?.number
            }
            Self::Postgres { url, runtime, .. } => runtime.block_on(async { connect(url).await?.query_one(APPLIED, &[]).await })?.get(0),
        };
        Ok(u64::try_from(number)?)
    }
}

async fn connect(url: &str) -> Result<Client, tokio_postgres::Error> {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
    // It ends with its client.
    tokio::spawn(connection);
    Ok(client)
}

impl Drop for Database {
    fn drop(&mut self) {
        if let Self::Postgres { name, server, runtime, .. } = self
            && let Err(error) = runtime.block_on(server.batch_execute(&format!("DROP DATABASE {name} WITH (FORCE)")))
        {
            eprintln!("cannot drop {name}: {error}");
        }
    }
}
