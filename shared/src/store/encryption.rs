//! Which encryption keys stored values need, and re-encrypting values with the first key.

use uuid::Uuid;

use super::{Result, Store};
use crate::encryption::{AtRest, EncryptionError, SealedFor};

/// The plaintext that is encrypted with a key, to tell later whether a key of the same name is the right one.
const PROOF: &[u8] = b"countersign";

/// The result of `api keys reencrypt`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reencrypted {
    /// Webhook secrets that are encrypted with the first key now, and were not before.
    pub secrets: usize,
    /// Other keys that are still needed, each with the number of requests whose headers need it. Retention deletes those requests.
    pub needed: Vec<(String, i64)>,
}

impl Store {
    /// Registers the first key, and checks that every key that stored values may need is configured and is the right one.
    ///
    /// # Errors
    /// [`StoreError::Encryption`](super::StoreError::Encryption) if a key is missing or wrong; another error if a statement fails.
    pub async fn agree_on_encryption(&self) -> Result<()> {
        if let Some(first) = self.keyring.first() {
            sqlx::query!(
                "-- encryption.register
                insert into encryption_keys (id, proof) values ($1, $2) on conflict do nothing",
                first,
                self.keyring.seal(SealedFor::Proof(first), PROOF).bytes,
            )
            .execute(&self.database)
            .await?;
        }
        // Read after the insert: if two processes register different keys under one name, both see the one that came first.
        let registered = sqlx::query!("-- encryption.registered\nselect id, proof from encryption_keys order by first_used_at")
            .fetch_all(&self.database);
        for row in registered.await? {
            let proof = AtRest { key_id: Some(row.id.clone()), bytes: row.proof };
            self.keyring.open(SealedFor::Proof(&row.id), proof).map_err(|error| match error {
                EncryptionError::Forged(id) => EncryptionError::OtherKey(id),
                other => other,
            })?;
        }
        Ok(())
    }

    /// Encrypts every webhook secret with the first key. Unregisters keys that nothing needs any more: they can be removed from
    /// `ENCRYPTION_KEY`. Headers of requests stay as they are, and are deleted with their requests.
    ///
    /// # Errors
    /// If a statement fails, or if a value can't be read. Then nothing was changed, or only the secrets were.
    pub async fn reencrypt(&self) -> Result<Reencrypted> {
        let first = self.keyring.first().map(ToOwned::to_owned);
        let mut transaction = self.database.begin().await?;
        let keys = sqlx::query!(
            "-- encryption.secrets
            select id, webhook_secret, webhook_secret_key_id from api_keys
            where webhook_secret_key_id is distinct from $1 order by id for no key update",
            first.as_deref(),
        )
        .fetch_all(&mut transaction)
        .await?;
        let retired = sqlx::query!(
            "-- encryption.retired_secrets
            select id, api_key_id, secret, secret_key_id from retired_webhook_secrets
            where secret_key_id is distinct from $1 order by id for update",
            first.as_deref(),
        )
        .fetch_all(&mut transaction)
        .await?;
        let reseal = |api_key: Uuid, key_id, bytes| {
            let place = SealedFor::WebhookSecret(api_key);
            self.keyring.open(place, AtRest { key_id, bytes }).map(|plain| self.keyring.seal(place, plain.expose()))
        };
        let secrets = keys.len() + retired.len();
        for row in keys {
            let stored = reseal(row.id, row.webhook_secret_key_id, row.webhook_secret)?;
            sqlx::query!(
                "-- encryption.reseal\nupdate api_keys set webhook_secret = $2, webhook_secret_key_id = $3 where id = $1",
                row.id,
                stored.bytes,
                stored.key_id,
            )
            .execute(&mut transaction)
            .await?;
        }
        for row in retired {
            let stored = reseal(row.api_key_id, row.secret_key_id, row.secret)?;
            sqlx::query!(
                "-- encryption.reseal_retired\nupdate retired_webhook_secrets set secret = $2, secret_key_id = $3 where id = $1",
                row.id,
                stored.bytes,
                stored.key_id,
            )
            .execute(&mut transaction)
            .await?;
        }
        // The potentially slow part comes after the commit, so that no key's row is locked meanwhile.
        transaction.commit().await?;
        let needed = sqlx::query!(
            r#"-- encryption.needed
            select k.id, (select count(*) from requests r where r.webhook_headers_key_id = k.id) as "requests!"
            from encryption_keys k where k.id is distinct from $1 order by k.id"#,
            first.as_deref(),
        )
        .fetch_all(&self.database)
        .await?;
        let (needed, forgotten): (Vec<_>, Vec<_>) = needed.into_iter().map(|row| (row.id, row.requests)).partition(|(_, n)| *n > 0);
        let forgotten: Vec<String> = forgotten.into_iter().map(|(id, _)| id).collect();
        // Another process may have used one of them in the meantime.
        sqlx::query!(
            "-- encryption.forget
            delete from encryption_keys k
            where k.id = any($1)
                and not exists (select from requests r where r.webhook_headers_key_id = k.id)
                and not exists (select from api_keys a where a.webhook_secret_key_id = k.id)
                and not exists (select from retired_webhook_secrets s where s.secret_key_id = k.id)",
            &forgotten,
        )
        .execute(&self.database)
        .await?;
        Ok(Reencrypted { secrets, needed })
    }
}
