//! Does the database take writes?

use diesel::dsl::sql;
use diesel::prelude::*;
use diesel::sql_types::Bool;
use diesel_async::RunQueryDsl;

use super::Connection;
use crate::db::DbError;
use crate::db::schema::sessions;

/// Opens and ends a transaction that holds the write lock and changes no row.
pub async fn take_write_lock(connection: &mut Connection) -> Result<(), DbError> {
    transaction!(connection, async |connection| {
        let none = sessions::table.filter(sql::<Bool>("1 = 0"));
        diesel::update(none).set(sessions::room_name.eq(sessions::room_name)).execute(connection).await?;
        Ok(())
    })
}
