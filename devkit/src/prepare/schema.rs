//! `docs/schema.md`: the schema that all migrations together make, with its comments.

use std::fmt::Write;

use anyhow::{Context, Result};
use sqlx::{AssertSqlSafe, Connection, PgConnection, Row};

const TABLES: &str = "
    select c.relname::text, obj_description(c.oid) from pg_class c
    where c.relnamespace = 'public'::regnamespace and c.relkind = 'r' and c.relname <> '_sqlx_migrations'
    order by c.relname";

const COLUMNS: &str = "
    select a.attname::text, format_type(a.atttypid, a.atttypmod) || case when a.attnotnull then '' else ', or null' end,
        case when a.attidentity <> '' then 'generated always as identity' else pg_get_expr(d.adbin, d.adrelid, true) end,
        col_description(a.attrelid, a.attnum)
    from pg_attribute a left join pg_attrdef d on (d.adrelid, d.adnum) = (a.attrelid, a.attnum)
    where a.attrelid = $1::regclass and a.attnum > 0 and not a.attisdropped
    order by a.attnum";

const CONSTRAINTS: &str = r"
    select conname::text, regexp_replace(pg_get_constraintdef(oid, true), '\s+', ' ', 'g') from pg_constraint
    where conrelid = $1::regclass and contype in ('c', 'f') order by contype, conname";

const INDEXES: &str = "
    select i.relname::text,
        case when x.indisunique then 'unique ' else '' end || substring(pg_get_indexdef(x.indexrelid) from ' USING (.*)')
    from pg_index x join pg_class i on i.oid = x.indexrelid
    where x.indrelid = $1::regclass order by i.relname";

const TRIGGERS: &str = "
    select tgname::text, obj_description(oid) from pg_trigger where tgrelid = $1::regclass and not tgisinternal order by tgname";

const TYPES: &str = "
    select t.typname::text, string_agg(e.enumlabel, ', ' order by e.enumsortorder)
    from pg_type t join pg_enum e on e.enumtypid = t.oid
    where t.typnamespace = 'public'::regnamespace group by t.typname order by t.typname";

const FUNCTIONS: &str = "
    select p.proname::text || '(' || pg_get_function_identity_arguments(p.oid) || ')', obj_description(p.oid)
    from pg_proc p where p.pronamespace = 'public'::regnamespace order by 1";

/// The schema of the database at `url`, as Markdown.
pub(super) async fn describe(url: &str) -> Result<String> {
    let mut database = PgConnection::connect(url).await.context("connecting to the new database")?;
    let mut text = "# Schema\n\nWhat all migrations together make, with its comments. `make prepare` writes this file.\n".to_owned();
    for [table, what] in rows(&mut database, TABLES, None).await? {
        let _ = write!(text, "\n## `{table}`\n\n{what}\n\n| column | type | default | what |\n|---|---|---|---|\n");
        for [column, kind, default, what] in rows(&mut database, COLUMNS, Some(&table)).await? {
            let _ =
                writeln!(text, "| `{column}` | {kind} | {} | {what} |", if default.is_empty() { default } else { format!("`{default}`") });
        }
        list(&mut text, "Constraints", rows(&mut database, CONSTRAINTS, Some(&table)).await?, true);
        list(&mut text, "Indexes", rows(&mut database, INDEXES, Some(&table)).await?, true);
        list(&mut text, "Triggers", rows(&mut database, TRIGGERS, Some(&table)).await?, false);
    }
    list(&mut text, "Types", rows(&mut database, TYPES, None).await?, false);
    list(&mut text, "Functions", rows(&mut database, FUNCTIONS, None).await?, false);
    Ok(text)
}

/// A list of names and what they are, unless it is empty.
fn list(text: &mut String, title: &str, rows: Vec<[String; 2]>, is_code: bool) {
    if rows.is_empty() {
        return;
    }
    let _ = write!(text, "\n{title}:\n\n");
    for [name, what] in rows {
        let _ = if is_code { writeln!(text, "- `{name}`: `{what}`") } else { writeln!(text, "- `{name}`: {what}") };
    }
}

/// The rows of a query about `table`; null is empty.
async fn rows<const N: usize>(database: &mut PgConnection, sql: &str, table: Option<&str>) -> Result<Vec<[String; N]>> {
    let query = sqlx::query(AssertSqlSafe(sql));
    let query = if let Some(table) = table { query.bind(table) } else { query };
    let rows = query.fetch_all(database).await.context("reading the catalog")?;
    Ok(rows.iter().map(|row| std::array::from_fn(|column| row.get::<Option<String>, _>(column).unwrap_or_default())).collect())
}
