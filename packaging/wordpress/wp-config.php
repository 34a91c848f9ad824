<?php
// WordPress with its database on the mount of litefs. What differs from node to node comes from the
// environment, so that one image serves all nodes.

// The directory of the mount. The file has the plugin's own name for it: .ht.sqlite
define( 'DB_DIR', getenv( 'DB_DIR' ) ?: '/litefs' );
define( 'DB_NAME', 'wordpress' );
define( 'DB_USER', '' );
define( 'DB_PASSWORD', '' );
define( 'DB_HOST', '' );
define( 'DB_CHARSET', 'utf8' );
define( 'DB_COLLATE', '' );
$table_prefix = 'wp_';

// The same secret on every node: who is logged in on one is logged in on all. Without one nobody could
// tell a cookie of this site from a forged one, so there is no default.
$secret = getenv( 'WORDPRESS_SECRET' );
if ( ! $secret ) {
	http_response_code( 500 );
	exit( 'WORDPRESS_SECRET is not set: it must be a long random text, the same on every node.' );
}
foreach ( array( 'AUTH', 'SECURE_AUTH', 'LOGGED_IN', 'NONCE' ) as $name ) {
	define( $name . '_KEY', hash_hmac( 'sha256', $name . '_KEY', $secret ) );
	define( $name . '_SALT', hash_hmac( 'sha256', $name . '_SALT', $secret ) );
}

// Each node answers under the address that it was asked by.
if ( isset( $_SERVER['HTTP_HOST'] ) ) {
	$scheme = ( $_SERVER['HTTP_X_FORWARDED_PROTO'] ?? 'http' ) === 'https' ? 'https' : 'http';
	define( 'WP_HOME', $scheme . '://' . $_SERVER['HTTP_HOST'] );
	define( 'WP_SITEURL', WP_HOME );
}

// A page view must not write: what is due runs from outside, by wp-cron.php through the proxy. Files
// are part of the image.
define( 'DISABLE_WP_CRON', true );
define( 'DISALLOW_FILE_MODS', true );
define( 'AUTOMATIC_UPDATER_DISABLED', true );
// Errors go to a file, for who names one.
define( 'WP_DEBUG', (bool) getenv( 'WP_DEBUG_LOG' ) );
define( 'WP_DEBUG_LOG', getenv( 'WP_DEBUG_LOG' ) ?: false );
define( 'WP_DEBUG_DISPLAY', false );

if ( ! defined( 'ABSPATH' ) ) {
	define( 'ABSPATH', __DIR__ . '/' );
}
require_once ABSPATH . 'wp-settings.php';
