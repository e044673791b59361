//! The addresses that the most recently started worker allows for webhooks. An `api` reads them before it refuses one, because its own
//! settings may lack it.

use ipnet::IpNet;

use super::{Result, Store, StoreError};
use crate::address_guard::{AddressSettings, Networks, Ports};

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
        let networks: Result<Vec<IpNet>, _> = row.networks.iter().map(|network| network.parse()).collect();
        let ports: Result<Vec<u16>, _> = row.ports.into_iter().map(u16::try_from).collect();
        Ok(Some(AddressSettings {
            webhook_allow_networks: Networks(networks.map_err(|_| StoreError::Corrupt("network"))?),
            webhook_allow_ports: Ports(ports.map_err(|_| StoreError::Corrupt("port"))?),
        }))
    }
}
