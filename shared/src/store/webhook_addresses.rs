//! The addresses that the most recently started worker allows for webhooks. An `api` reads them before it refuses one, because its own
//! settings may lack it.

use super::{Result, Store, StoreError};
use crate::address_guard::AddressSettings;

impl Store {
    /// Publishes what this worker allows besides the public internet.
    ///
    /// # Errors
    /// If a statement fails.
    pub async fn allow_webhook_addresses(&self, allowed: &AddressSettings) -> Result<()> {
        sqlx::query!(
            "-- webhook_addresses.allow
            insert into webhook_addresses (networks, ports) values ($1, $2)
            on conflict (only_row) do update set networks = excluded.networks, ports = excluded.ports
            where (webhook_addresses.networks, webhook_addresses.ports) is distinct from (excluded.networks, excluded.ports)",
            &allowed.webhook_allow_networks.0.iter().map(ToString::to_string).collect::<Vec<_>>(),
            &allowed.webhook_allow_ports.0.iter().map(|&port| port.into()).collect::<Vec<i32>>(),
        )
        .execute(&self.database)
        .await?;
        Ok(())
    }

    /// What the most recently started worker allows; `None` if no worker has ever started.
    ///
    /// # Errors
    /// If a statement fails.
    pub async fn webhook_addresses(&self) -> Result<Option<AddressSettings>> {
        let allowed = sqlx::query!("-- webhook_addresses.allowed\nselect networks, ports from webhook_addresses")
            .fetch_optional(&self.database)
            .await?;
        let Some(row) = allowed else { return Ok(None) };
        let corrupt = StoreError::Corrupt("network");
        let ports = row.ports.into_iter().map(|port| port.to_string()).collect::<Vec<_>>().join(",");
        match (row.networks.join(",").parse(), ports.parse()) {
            (Ok(webhook_allow_networks), Ok(webhook_allow_ports)) => {
                Ok(Some(AddressSettings { webhook_allow_networks, webhook_allow_ports }))
            }
            _ => Err(corrupt),
        }
    }
}
