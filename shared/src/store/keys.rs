//! API keys: 256 random bits, shown once, stored as a digest.

use std::time::{Duration, Instant};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use ring::hmac;
use time::OffsetDateTime;
use uuid::Uuid;

use super::{Result, Store, StoreError, duration, listen, place};
use crate::encryption::SealedFor;
use crate::message::sha256;
use crate::secret::{Secret, random_bytes};
use crate::standard_webhooks::WebhookSecret;
use crate::telemetry::display_chain;

/// Identifies an API key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KeyId(pub(super) Uuid);

/// What a key may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scope {
    /// Post messages, and read what was posted with the same key.
    Sign,
    /// Read every request.
    Admin,
}

impl Scope {
    /// The scope's name, in the store and on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Sign => "sign",
            Self::Admin => "admin",
        }
    }
}

impl std::str::FromStr for Scope {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.trim() {
            "sign" => Ok(Self::Sign),
            "admin" => Ok(Self::Admin),
            _ => Err("accepted: sign, admin, or both with a comma between".to_owned()),
        }
    }
}

/// The name of the key of `BOOTSTRAP_API_KEY`. No other key may have it: it would be taken for an earlier one, and replaced.
pub const BOOTSTRAP: &str = "bootstrap";

/// An API key as its holder sends it.
#[derive(Clone, Debug)]
pub struct ApiKey(Secret<String>);

impl ApiKey {
    /// A new key of 256 random bits.
    ///
    /// # Panics
    /// If the operating system provides no random bytes.
    #[must_use]
    pub fn generate() -> Self {
        Self(Secret::new(format!("cs_{}", URL_SAFE_NO_PAD.encode(random_bytes::<32>()))))
    }

    /// A key that a caller presented.
    #[must_use]
    pub fn presented(text: &str) -> Self {
        Self(Secret::new(text.to_owned()))
    }

    /// The key, to show to its owner once.
    #[must_use]
    pub fn expose(&self) -> &str {
        self.0.expose()
    }

    /// The digest of the key, which is what the store keeps.
    #[must_use]
    pub fn digest(&self) -> KeyDigest {
        KeyDigest(sha256(&[self.0.expose().as_bytes()]))
    }
}

/// SHA-256 of an API key.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct KeyDigest([u8; 32]);

impl std::fmt::Debug for KeyDigest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("[key digest]")
    }
}

impl KeyDigest {
    /// Whether this is the digest `stored`, compared in constant time: ring verifies an HMAC of one against an HMAC of the other, so the
    /// time it takes says nothing about where they differ.
    #[must_use]
    pub fn is(&self, stored: &[u8]) -> bool {
        let key = hmac::Key::new(hmac::HMAC_SHA256, b"api key comparison");
        hmac::verify(&key, stored, hmac::sign(&key, &self.0).as_ref()).is_ok()
    }
}

/// A live key, as the API needs it for a request.
#[derive(Clone, Debug)]
pub struct Caller {
    /// Which key it is.
    pub key: KeyId,
    /// What it may do.
    pub scopes: Vec<Scope>,
    /// When it expires, if it does, by the clock of this process.
    pub expires: Option<Instant>,
}

/// A key as an operator sees it.
#[derive(Clone, Debug)]
pub struct KeyRow {
    /// Its name.
    pub name: String,
    /// What it may do.
    pub scopes: Vec<String>,
    /// When it was created.
    pub created_at: OffsetDateTime,
    /// When it expires, if it does.
    pub expires_at: Option<OffsetDateTime>,
    /// Whether it has.
    pub is_expired: bool,
    /// When it was revoked, if it was.
    pub revoked_at: Option<OffsetDateTime>,
}

/// The outcome of making sure that the bootstrap key exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bootstrapped {
    /// It exists as it should.
    Exists,
    /// The key was revoked, or has another name: an operator did that.
    LeftAlone,
}

/// The outcome of a change to a live key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Changed {
    /// It is done.
    Done,
    /// No live key has this name.
    NoSuchKey,
}

/// The outcome of creating a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Created {
    /// The key was created.
    Created,
    /// A live key already has this name.
    NameTaken,
}

impl Store {
    /// The live keys with these digests, in order. `None` for one that is unknown, expired or revoked.
    ///
    /// # Errors
    /// If the statement fails.
    pub async fn callers(&self, digests: &[KeyDigest]) -> Result<Vec<Option<Caller>>> {
        let asked = Instant::now();
        let columns: Vec<Vec<u8>> = digests.iter().map(|digest| digest.0.to_vec()).collect();
        let rows = sqlx::query!(
            r#"-- keys.callers
            select ord as "ord!", k.id, k.digest, k.scopes, extract(epoch from k.expires_at - now())::float8 as expires_in
            from unnest($1::bytea[]) with ordinality as asked (digest, ord)
            cross join lateral (
                select * from api_keys
                where digest = asked.digest and revoked_at is null and (expires_at is null or expires_at > now())
                limit 1
            ) k"#,
            &columns,
        )
        .fetch_all(&self.database)
        .await?;
        let mut callers = vec![None; digests.len()];
        for row in rows {
            let place = place(row.ord)?;
            if digests[place].is(&row.digest) {
                let scopes: Result<Vec<Scope>, _> = row.scopes.iter().map(|scope| scope.parse()).collect();
                // An expiry too far away to be represented is never.
                let expires = row.expires_in.and_then(duration).and_then(|left| asked.checked_add(left));
                callers[place] = Some(Caller { key: KeyId(row.id), scopes: scopes.map_err(|_| StoreError::Corrupt("scope"))?, expires });
            }
        }
        Ok(callers)
    }

    /// Adds a key. One that has expired gives its name away: it is revoked.
    ///
    /// # Errors
    /// If a statement fails.
    pub async fn create_key(
        &self,
        name: &str,
        key: &ApiKey,
        scopes: &[Scope],
        secret: &WebhookSecret,
        expires_in: Option<Duration>,
    ) -> Result<Created> {
        let scopes: Vec<String> = scopes.iter().map(|scope| scope.name().to_owned()).collect();
        let id = Uuid::now_v7();
        let stored = self.keyring.seal(SealedFor::WebhookSecret(id), secret.expose_bytes());
        sqlx::query!(
            "-- keys.revoke_expired
            update api_keys set revoked_at = expires_at where name = $1 and revoked_at is null and expires_at <= now()",
            name,
        )
        .execute(&self.database)
        .await?;
        let inserted = sqlx::query!(
            "-- keys.create
            insert into api_keys (id, name, digest, scopes, webhook_secret, webhook_secret_key_id, expires_at)
            values ($1, $2, $3, $4, $5, $6, now() + make_interval(secs => $7))
            on conflict do nothing",
            id,
            name,
            &key.digest().0,
            &scopes,
            stored.bytes,
            stored.key_id,
            expires_in.map(super::seconds),
        )
        .execute(&self.database)
        .await?;
        Ok(if inserted.rows_affected() == 1 { Created::Created } else { Created::NameTaken })
    }

    /// Makes `key` exist with both scopes under the name `bootstrap`, replacing the one that was there before. Without a `secret`, the
    /// stored one stays; the first time, one is generated. Changes nothing if the same key exists under another name, or was revoked: what
    /// an operator did by hand takes precedence.
    ///
    /// # Errors
    /// If a statement fails.
    pub async fn bootstrap_key(&self, key: &ApiKey, secret: Option<&WebhookSecret>) -> Result<Bootstrapped> {
        let fallback = WebhookSecret::generate();
        let id = Uuid::now_v7();
        let first = self.keyring.seal(SealedFor::WebhookSecret(id), secret.unwrap_or(&fallback).expose_bytes());
        let mut transaction = self.database.begin().await?;
        // One at a time: the second one finds the row of the first.
        sqlx::query!("-- keys.alone\nselect from pg_advisory_xact_lock(hashtext('countersign.bootstrap'))")
            .execute(&mut transaction)
            .await?;
        let made = sqlx::query_scalar!(
            "-- keys.bootstrap
            insert into api_keys (id, name, digest, scopes, webhook_secret, webhook_secret_key_id)
            select $1, 'bootstrap', $2, '{sign,admin}', $3, $4
            where not exists (select from api_keys where digest = $2 and (name <> 'bootstrap' or revoked_at is not null))
            on conflict (name) where revoked_at is null do update
                set digest = excluded.digest, scopes = excluded.scopes, expires_at = null
            returning id",
            id,
            &key.digest().0,
            first.bytes,
            first.key_id,
        )
        .fetch_optional(&mut transaction)
        .await?;
        // The secret is encrypted for its row, so it can only be replaced once the row is known.
        if let (Some(row), Some(secret)) = (made.filter(|row| *row != id), secret) {
            let stored = self.keyring.seal(SealedFor::WebhookSecret(row), secret.expose_bytes());
            sqlx::query!(
                "-- keys.bootstrap_secret\nupdate api_keys set webhook_secret = $2, webhook_secret_key_id = $3 where id = $1",
                row,
                stored.bytes,
                stored.key_id,
            )
            .execute(&mut transaction)
            .await?;
        }
        transaction.commit().await?;
        Ok(if made.is_some() { Bootstrapped::Exists } else { Bootstrapped::LeftAlone })
    }

    /// Replaces the webhook secret of the live key of this name. Until `grace` is over, webhooks are also signed with the previous secret,
    /// and with earlier ones until their own grace is over. Without a grace, they are signed with the new secret only.
    ///
    /// # Errors
    /// If a statement fails.
    pub async fn rotate_webhook_secret(&self, name: &str, secret: &WebhookSecret, grace: std::time::Duration) -> Result<Changed> {
        let mut transaction = self.database.begin().await?;
        let held =
            sqlx::query_scalar!("-- keys.hold\nselect id from api_keys where name = $1 and revoked_at is null for no key update", name,);
        let Some(id) = held.fetch_optional(&mut transaction).await? else { return Ok(Changed::NoSuchKey) };
        if grace.is_zero() {
            sqlx::query!("-- keys.drop_retired\ndelete from retired_webhook_secrets where api_key_id = $1", id)
                .execute(&mut transaction)
                .await?;
        } else {
            sqlx::query!(
                "-- keys.retire
                insert into retired_webhook_secrets (api_key_id, secret, secret_key_id, signs_until)
                select id, webhook_secret, webhook_secret_key_id, now() + make_interval(secs => $2) from api_keys where id = $1",
                id,
                super::seconds(grace),
            )
            .execute(&mut transaction)
            .await?;
        }
        let stored = self.keyring.seal(SealedFor::WebhookSecret(id), secret.expose_bytes());
        sqlx::query!(
            "-- keys.rotate\nupdate api_keys set webhook_secret = $2, webhook_secret_key_id = $3 where id = $1",
            id,
            stored.bytes,
            stored.key_id,
        )
        .execute(&mut transaction)
        .await?;
        transaction.commit().await?;
        Ok(Changed::Done)
    }

    /// All keys, oldest first.
    ///
    /// # Errors
    /// If a statement fails.
    pub async fn list_keys(&self) -> Result<Vec<KeyRow>> {
        Ok(sqlx::query_as!(
            KeyRow,
            r#"-- keys.list
            select name, scopes, created_at, expires_at, revoked_at, coalesce(expires_at <= now(), false) as "is_expired!"
            from api_keys order by created_at, name"#,
        )
        .fetch_all(&self.database)
        .await?)
    }

    /// Revokes the live key of this name and notifies every `api` process.
    ///
    /// # Errors
    /// If a statement fails.
    pub async fn revoke_key(&self, name: &str) -> Result<Changed> {
        let revoked = sqlx::query!("-- keys.revoke\nupdate api_keys set revoked_at = now() where name = $1 and revoked_at is null", name,)
            .execute(&self.database)
            .await?;
        if revoked.rows_affected() == 0 {
            return Ok(Changed::NoSuchKey);
        }
        // After the commit: a notification that can't be sent must not keep the key valid.
        let told = sqlx::query!("-- keys.tell\nselect pg_notify($1, '')", listen::KEYS).execute(&self.database).await;
        if let Err(error) = told {
            tracing::warn!(error = display_chain(&error), "can't tell `api` processes; they look again within seconds");
        }
        Ok(Changed::Done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_has_256_random_bits_and_matches_only_its_own_digest() {
        let (one, two) = (ApiKey::generate(), ApiKey::generate());
        assert_eq!(URL_SAFE_NO_PAD.decode(one.expose().strip_prefix("cs_").unwrap()).unwrap().len(), 32);
        assert!(one.digest().is(&one.digest().0));
        assert!(!one.digest().is(&two.digest().0));
        assert!(!one.digest().is(&one.digest().0[..31]));
    }
}
