<?php
// WordPress with its database on a mount of litefs. What differs from node to node comes from the
// environment, so that all nodes can have the same files.

// The directory of the database. The file has the plugin's own name for it: .ht.sqlite
define( 'DB_DIR', getenv( 'DB_DIR' ) );
define( 'DB_NAME', 'wordpress' );
define( 'DB_USER', '' );
define( 'DB_PASSWORD', '' );
define( 'DB_HOST', '' );
define( 'DB_CHARSET', 'utf8' );
define( 'DB_COLLATE', '' );
$table_prefix = 'wp_';

// The same on every node: who is logged in on one is logged in on all.
foreach ( array( 'AUTH', 'SECURE_AUTH', 'LOGGED_IN', 'NONCE' ) as $name ) {
	define( $name . '_KEY', 'a secret of this site' );
	define( $name . '_SALT', 'another secret of this site' );
}

// Each node answers under its own address.
if ( isset( $_SERVER['HTTP_HOST'] ) ) {
	define( 'WP_HOME', 'http://' . $_SERVER['HTTP_HOST'] );
	define( 'WP_SITEURL', WP_HOME );
}

// A page view must not write: what is due runs from outside, on the primary.
define( 'DISABLE_WP_CRON', true );
define( 'AUTOMATIC_UPDATER_DISABLED', true );
define( 'WP_HTTP_BLOCK_EXTERNAL', true );
define( 'WP_DEBUG', true );
define( 'WP_DEBUG_LOG', getenv( 'WP_DEBUG_LOG' ) ?: false );
define( 'WP_DEBUG_DISPLAY', false );

if ( ! defined( 'ABSPATH' ) ) {
	define( 'ABSPATH', __DIR__ . '/' );
}
require_once ABSPATH . 'wp-settings.php';
